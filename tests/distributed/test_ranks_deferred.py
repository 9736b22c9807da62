"""Deferred logits under each engine: the single process's curvature from plain logits."""

import pytest
import torch
from torch.nn import functional as F

from sophia import SophiaG
from sophia.curvature import GaussNewtonBartlett, deferred_logits
from tests.distributed import engines

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


class Net(engines.Net):
    """With a head of its own behind the block, or the embedding's matrix."""

    def __init__(self, tied):
        super().__init__()
        self.bias = None
        self.head = None if tied else torch.nn.Linear(engines.WIDTH, engines.VOCAB, bias=False)

    def forward(self, tokens, readout=None):
        hidden = self.block(self.embed(tokens))
        weight = self.embed.weight if self.head is None else self.head.weight
        return hidden @ weight.T if readout is None else readout(hidden, weight, engines.VOCAB - 1)


def build(tied):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(tied).double()


def curvature(engine, options, tied, noise, reduction, readout):
    """State after a refresh in two chunks, of which the second counts nothing on some rank, and a training backward."""
    model = engines.wrap(engine, build(tied), **options)
    if reduction == "sum":
        for unit in (model, model.block):
            unit.set_gradient_divide_factor(1.0)
    estimator = GaussNewtonBartlett(noise=noise, vocab_size=engines.VOCAB - 1)
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0), estimator=estimator, gradient_reduction=reduction)
    tokens, targets = engines.batch()
    own = engines.own_rows()
    counts = torch.ones(engines.ROWS, engines.CONTEXT, dtype=torch.bool)
    counts[0, 1:] = False
    counts[5:] = False
    forwards = [
        lambda part=part: (model(tokens[part], readout), counts[part])
        for part in (own[: len(own) // 2], own[len(own) // 2 :])
    ]
    assert optimizer.refresh_curvature(forwards, rows=own)
    if reduction == "mean":
        F.cross_entropy(model(tokens[own]).flatten(0, 1), targets[own].flatten()).backward()
    return engines.snapshot(model, optimizer)


def expected(tied, noise, world):
    """On one process, from plain logits: the chunks of the ranks together."""
    model = build(tied)
    estimator = GaussNewtonBartlett(noise=noise, vocab_size=engines.VOCAB - 1)
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0), estimator=estimator)
    tokens, targets = engines.batch()
    counts = torch.ones(engines.ROWS, engines.CONTEXT, dtype=torch.bool)
    counts[0, 1:] = False
    counts[5:] = False
    ranks = [list(range(rank, engines.ROWS, world)) for rank in range(world)]
    parts = [
        [row for own in ranks for row in own[: len(own) // 2]],
        [row for own in ranks for row in own[len(own) // 2 :]],
    ]
    optimizer.refresh_curvature([lambda p=p: (model(tokens[p]), counts[p]) for p in parts], rows=parts[0] + parts[1])
    F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    return engines.snapshot(model, optimizer)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("engine", "world", "options", "reduction", "noise"),
    [
        ("ddp", 2, {}, "mean", "labels"),
        ("ddp", 4, {"gradient_as_bucket_view": True, "static_graph": True}, "mean", "signs"),
        ("fsdp", 2, {"reshard_after_forward": True}, "mean", "labels"),
        ("fsdp", 2, {"reshard_after_forward": False}, "mean", "signs"),
        ("fsdp", 4, {"reshard_after_forward": True}, "sum", "signs"),
        ("hsdp", 4, {"reshard_after_forward": True}, "mean", "labels"),
        ("none", 2, {}, "none", "labels"),
    ],
)
def test_the_curvature_of_plain_logits_on_one_process(ranks, engine, world, options, reduction, noise, tied):
    found = ranks.run(curvature, engine, options, tied, noise, reduction, deferred_logits, world=world)[0]
    wanted = expected(tied, noise, world)
    if reduction != "mean":
        wanted = {name: value for name, value in wanted.items() if not name.endswith("grad")}
    engines.assert_same(found, wanted, **CLOSE)
