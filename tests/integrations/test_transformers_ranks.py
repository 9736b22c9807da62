"""Under the Trainer on two ranks, with the variables that torchrun sets: DDP and FSDP2 over gloo."""

import contextlib
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.distributed.ranks import Ranks
from tests.models import assert_same, curvature

WORLD = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Workers of their own: Accelerate leaves its mark on a process."""
    pool = Ranks(tmp_path_factory.mktemp("rendezvous"))
    yield pool
    pool.close()


def as_by_torchrun():
    """What torchrun tells a process; and no word of Accelerate's earlier groups."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    warnings.simplefilter("default")


def trained(folder, kind="gpt2", *, resume=None, logits=None, **settings):
    """A Trainer after its training, and its recorder."""
    as_by_torchrun()
    from sophia.integrations.transformers import SophiaCallback
    from tests.integrations.trainers import MAX_BATCH, fresh, trainer

    run, recorder = trainer(folder, fresh(kind), [SophiaCallback(logits=logits, max_batch=MAX_BATCH)], **settings)
    run.train(resume_from_checkpoint=resume)
    return run, recorder


def whole(model):
    """Weights, gathered where they are sharded."""
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def under_ddp(folder):
    run, recorder = trained(folder, gradient_accumulation_steps=2)
    from tests.integrations.trainers import KINDS, built, explicit_refresh, fresh, plain_loop

    assert isinstance(run.model_wrapped, DistributedDataParallel)
    twin = fresh("gpt2")

    def count(labels):
        total = sum((one != -100).sum() for one in labels)
        dist.all_reduce(total)
        return total

    optimizer = plain_loop(
        DistributedDataParallel(twin),
        built(),
        explicit_refresh(KINDS["gpt2"][1]),
        recorder,
        accumulation=2,
        count=count,
        scale=WORLD,
    )
    inner = run.optimizer.optimizer
    assert inner.refreshes == optimizer.refreshes == 2
    assert_same(run.model.parameters(), twin.parameters())
    assert_same(curvature(inner), curvature(optimizer))
    return [batch["input_ids"] for batch in recorder.batches], whole(run.model)


def test_ddp_is_the_plain_ddp_loop(ranks, tmp_path):
    """Bit for bit; each rank has data of its own."""
    (data, weights), (others, same_weights) = ranks.run(under_ddp, tmp_path, world=WORLD, seconds=120)
    assert not torch.equal(data[0], others[0])
    assert_same(weights, same_weights)


FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}


def under_fsdp(folder):
    run, _ = trained(folder / "ddp", "llama")
    with accelerate_shards_on_a_cpu():
        sharded, _ = trained(folder / "fsdp", "llama", **FSDP, save_strategy="steps", save_steps=2)
        assert all(isinstance(p, DTensor) for p in sharded.model.parameters())
        assert sharded.optimizer.optimizer.refreshes == 2
        torch.testing.assert_close(whole(sharded.model), whole(run.model))
        again, _ = trained(folder / "again", "llama", **FSDP, resume=str(folder / "fsdp" / "checkpoint-2"))
        assert_same(whole(again.model), whole(sharded.model))


def refused_under_fsdp(folder):
    from tests.integrations.trainers import fresh

    with accelerate_shards_on_a_cpu():
        run, _ = trained(folder, "llama", **FSDP, logits=lambda output: output.logits * torch.inf)
    assert run.optimizer.optimizer.stats()["refused_refreshes"] > 0
    assert_same(whole(run.model), fresh("llama").parameters())


def under_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    from sophia import SophiaG
    from sophia.integrations.transformers import SophiaCallback
    from tests.integrations.trainers import arguments, fresh

    as_by_torchrun()
    model = FullyShardedDataParallel(fresh("llama"), device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = SophiaG(model.parameters())
    # Accelerate has no FSDP1 without a GPU: the event by which training begins.
    with pytest.raises(ValueError, match=r"wrapped by FSDP1.*fsdp_config={\"version\": 2}"):
        SophiaCallback().on_train_begin(arguments("out"), None, None, optimizer=optimizer, model=model)


@contextlib.contextmanager
def accelerate_shards_on_a_cpu():
    """Accelerate shards on accelerators only: tell it that these ranks had some."""
    from accelerate.state import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    prepare = PartialState._prepare_backend
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    try:
        yield
    finally:
        PartialState._prepare_backend = prepare
        del os.environ["ACCELERATE_TORCH_DEVICE"]


def test_fsdp2_is_ddp_to_rounding_and_resumes_bit_for_bit(ranks, tmp_path):
    ranks.run(under_fsdp, tmp_path, world=WORLD, seconds=120)


def test_parameters_hold_under_fsdp2_too_while_refreshes_are_refused(ranks, tmp_path):
    ranks.run(refused_under_fsdp, tmp_path, world=WORLD, seconds=120)


def test_fsdp1_is_refused(ranks):
    ranks.run(under_fsdp1, world=WORLD, seconds=120)
