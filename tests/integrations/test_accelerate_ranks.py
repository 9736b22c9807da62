"""`integrations.accelerate.attach` on several processes: the weights are those of the plain DDP loop."""

import gc
import os
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sophia import SophiaG
from tests.distributed.ranks import Ranks
from tests.models import seeded

pytest.importorskip("accelerate", reason="needs Accelerate (the extra `hf`)")

from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

from sophia.integrations.accelerate import attach
from tests.integrations.test_accelerate import SETTINGS, build, forget, loader, loss_of

STEPS, ACCUMULATE, MAX_BATCH = 4, 2, 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = Ranks(tmp_path_factory.mktemp("rendezvous"))
    yield pool
    pool.close()


def own_batches():
    """What `prepare` deals out: every rank its turn of whole batches."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return list(loader(STEPS * ACCUMULATE * world))[rank::world]


def with_accelerate(engine):
    warnings.filterwarnings("ignore", category=UserWarning, module="accelerate")
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    launched = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "OMP_NUM_THREADS": "1",
    }
    before = dict(os.environ)
    os.environ.update(launched)  # as torchrun and `accelerate launch` do
    try:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
        if engine == "fsdp2":  # which Accelerate offers on accelerators only; what it does is the same here
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2, cpu_ram_efficient_loading=False
            )
        net = seeded(build).double()
        given = [weakref.ref(p) for p in net.parameters()]
        model, optimizer, data = accelerator.prepare(
            net, SophiaG(net.parameters(), **SETTINGS), loader(STEPS * ACCUMULATE * dist.get_world_size())
        )
        attach(optimizer, model, max_batch=MAX_BATCH)
        if engine == "fsdp2":  # other parameters, and the optimizer has let go of those that it was built with
            gc.collect()
            assert [p() for p in given] == [None] * len(given)
        else:
            assert isinstance(model, DistributedDataParallel)
        for index, (tokens, targets) in enumerate(data):
            with accelerator.accumulate(model):
                torch.manual_seed(2 * index + dist.get_rank())
                accelerator.backward(loss_of(model(tokens), targets))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        weights = [p.detach() for p in net.parameters()]
        return [p.full_tensor() if isinstance(p, DTensor) else p for p in weights], optimizer.optimizer.refreshes
    finally:
        forget()
        os.environ.clear()
        os.environ.update(before)


def in_a_plain_loop():
    net = seeded(build).double()
    model = DistributedDataParallel(net)
    optimizer = SophiaG(model.parameters(), **SETTINGS)
    for index, (tokens, targets) in enumerate(own_batches()):
        torch.manual_seed(2 * index + dist.get_rank())
        (loss_of(model(tokens), targets) / ACCUMULATE).backward()
        if (index + 1) % ACCUMULATE:
            continue
        optimizer.refresh_curvature(lambda tokens=tokens: model(tokens[:MAX_BATCH]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in net.parameters()], optimizer.refreshes


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_is_equal_to_the_plain_ddp_loop(ranks, engine):
    plain = ranks.run(in_a_plain_loop)
    for weights, refreshes in ranks.run(with_accelerate, engine):
        assert refreshes == plain[0][1] == 2
        torch.testing.assert_close(weights, plain[0][0], rtol=1e-9, atol=1e-12)
