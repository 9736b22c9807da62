"""One small language model, one batch, and the engines that spread them over ranks; the same code on one process."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

VOCAB, WIDTH, HIDDEN, ROWS, CONTEXT = 11, 6, 5, 8, 4


class Block(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Embedding, one MLP block, tied head. Over four ranks some shards are uneven (11, 5) and some empty (6, 5).

    With `spare` it has a parameter more, which a forward may leave unused.
    """

    def __init__(self, dropout=0.0, spare=False):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.block = Block(dropout)
        self.bias = nn.Parameter(torch.zeros(VOCAB))
        self.spare = nn.Parameter(torch.linspace(-1, 1, VOCAB)) if spare else None

    def forward(self, tokens, use_spare=True):
        logits = self.block(self.embed(tokens)) @ self.embed.weight.T + self.bias
        return logits if self.spare is None or not use_spare else logits * self.spare


def build(dtype=torch.float64, seed=0, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**settings).to(dtype)


def batch(step=0, rows=ROWS):
    """Tokens and targets of the global batch of a step, [rows, CONTEXT] each."""
    generator = torch.Generator().manual_seed(1000 + step)
    both = torch.randint(0, VOCAB, (2, rows, CONTEXT), generator=generator)
    return both[0], both[1]


def place():
    """(rank, number of ranks), also where there is only this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own_rows(rows=ROWS):
    """The global indices of this rank's rows: dealt out in turn, so that counting them would number them wrongly."""
    rank, world = place()
    return list(range(rank, rows, world))


def wrap(engine, model, **options):
    """The net under "ddp", "fsdp" (two FSDP2 units), "hsdp" (sharded in pairs, replicated over pairs) or "none"."""
    if engine == "hsdp":
        options["mesh"] = init_device_mesh("cpu", (place()[1] // 2, 2), mesh_dim_names=("replicate", "shard"))
    if engine in ("fsdp", "hsdp"):
        fully_shard(model.block, **options)
    return spread(engine, model, **options)


def spread(engine, model, **options):
    """Any model as one unit of the engine."""
    if engine == "ddp":
        return DistributedDataParallel(model, **options)
    if engine == "none":
        return model
    fully_shard(model, **options)
    # After a forward without backward the module's own parameters are gathered copies.
    model.shards = dict(model.named_parameters())
    return model


def whole(tensor):
    """The full tensor, detached, owned by the caller, whatever its parts lie on."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def parameters(model):
    """What the optimizer holds, by name."""
    shards = getattr(model, "shards", None)
    return shards if shards else {name.removeprefix("module."): p for name, p in model.named_parameters()}


def snapshot(model, optimizer=None):
    """Parameters, gradients and state, whole, by name."""
    found = {}
    for name, p in parameters(model).items():
        found[name] = whole(p)
        if p.grad is not None:
            found[f"{name}.grad"] = whole(p.grad)
        if optimizer is not None:
            for key, value in optimizer.state.get(p, {}).items():
                found[f"{name}.{key}"] = whole(value)
    return found


def assert_same(found, expected, **tolerance):
    """Equal snapshots: bit for bit, unless a tolerance is given."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, n=name: f"{n}: {m}"
        )
