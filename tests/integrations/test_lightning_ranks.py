"""SophiaCallback on several ranks, DDP and FSDP2: the weights are those of the plain DDP loop."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sophia import SophiaG
from tests.distributed.ranks import Ranks
from tests.models import seeded

L = pytest.importorskip("lightning.pytorch", reason="needs Lightning (the extra `lightning`)")

from lightning.fabric.plugins.environments import LightningEnvironment  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402

from sophia.integrations.lightning import SophiaCallback  # noqa: E402
from tests.integrations.test_lightning import SETTINGS, Batches, Module, batches, build, loss_of, trainer  # noqa: E402

STEPS, ACCUMULATE, MAX_BATCH = 4, 2, 3


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pool = Ranks(tmp_path_factory.mktemp("rendezvous"))
    yield pool
    pool.close()


class AlreadyMet(LightningEnvironment):
    """Processes that have their process group."""

    creates_processes_externally = True

    def global_rank(self):
        return dist.get_rank()

    local_rank = global_rank

    def world_size(self):
        return dist.get_world_size()


def own_batches():
    """This rank's rows; the names are nothing that a slice could be made of, and no business of the model."""
    own = slice(dist.get_rank(), None, dist.get_world_size())
    found = [(tokens[own], targets[own]) for tokens, targets in batches(STEPS * ACCUMULATE)]
    return [(tokens, targets, ["name"] * len(tokens)) for tokens, targets in found]


class Named(Module):
    def __init__(self, call):
        super().__init__(call)
        self.net.double()

    def training_step(self, batch, index):
        return super().training_step(batch[:2], 2 * index + self.global_rank)


class Sharded(Named):
    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for part in (self.net[1], self.net):
            fully_shard(part, mesh=mesh)


def in_lightning(call, engine):
    warnings.simplefilter("ignore")  # the workers make errors of them; Lightning has much to say
    module = (Named if engine == "ddp" else Sharded)(call)
    sharded = ModelParallelStrategy(data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
    kept = trainer(
        SophiaCallback(max_batch=MAX_BATCH),
        strategy="ddp" if engine == "ddp" else sharded,
        devices=dist.get_world_size(),
        plugins=[AlreadyMet()],
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=0.1,
    )
    kept.fit(module, Batches(own_batches()))
    weights = [p.detach() for p in module.net.parameters()]
    return [p.full_tensor() if isinstance(p, DTensor) else p for p in weights], kept.optimizers[0].refreshes


def in_a_plain_loop():
    net = seeded(build).double()
    model = DistributedDataParallel(net)
    optimizer = SophiaG(model.parameters(), **SETTINGS)
    for index, (tokens, targets, _) in enumerate(own_batches()):
        torch.manual_seed(2 * index + dist.get_rank())
        (loss_of(model(tokens), targets) / ACCUMULATE).backward()
        if (index + 1) % ACCUMULATE:
            continue
        optimizer.refresh_curvature(lambda tokens=tokens: model(tokens[:MAX_BATCH]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in net.parameters()], optimizer.refreshes


def with_tensor_parallelism():
    warnings.simplefilter("ignore")
    kept = trainer(
        SophiaCallback(), strategy=ModelParallelStrategy(), devices=dist.get_world_size(), plugins=[AlreadyMet()]
    )
    with pytest.raises(ValueError, match="does not support tensor parallelism"):
        kept.fit(Sharded("self"), Batches(own_batches()))


def test_tensor_parallelism_is_refused(ranks):
    ranks.run(with_tensor_parallelism)


@pytest.mark.parametrize(("engine", "call"), [("ddp", "self"), ("ddp", "self.net"), ("fsdp2", "self")])
def test_is_equal_to_the_plain_ddp_loop(ranks, engine, call):
    plain = ranks.run(in_a_plain_loop)
    for weights, refreshes in ranks.run(in_lightning, call, engine):
        assert refreshes == plain[0][1] == 2
        torch.testing.assert_close(weights, plain[0][0], rtol=1e-9, atol=1e-12)
