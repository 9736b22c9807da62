"""SophiaK on two ranks is SophiaK on one with the whole batch; both ranks have the same state to the last bit."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from sophia import SophiaK
from sophia.curvature import GaussNewtonBartlett
from tests.distributed import engines
from tests.sophia_k import nets

STEPS, CHUNK = 5, 4
SETTINGS = {"lr": 0.02, "curvature_interval": 2, "seed": 6}
# Eigenvectors of statistics whose sums were taken in another order.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def own_rows(chunk):
    """This rank's rows of a chunk of the global batch."""
    rank, world = engines.place()
    return [row for row in range(chunk * CHUNK, (chunk + 1) * CHUNK) if row % world == rank]


def forwards(model, x, spoilt=None):
    """One for each chunk, which all ranks share, and the rows that they hold here."""
    rows = [own_rows(chunk) for chunk in range(len(x) // CHUNK)]

    def forward(own):
        logits = model(x[own])
        if spoilt is not None and engines.place()[0] == spoilt:
            logits.register_hook(lambda gradient: gradient * torch.nan)
        return logits

    return [lambda own=own: forward(own) for own in rows], [row for own in rows for row in own]


def backward(model, engine, x, y):
    own = [row for row in range(len(x)) if row % engines.place()[1] == engines.place()[0]]
    F.cross_entropy(model(x[own]), y[own]).backward()
    if engine == "by hand":
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= engines.place()[1]


def train(engine, settings):
    model = nets.build(dropout=0.0)
    wrapped = engines.spread("ddp", model) if engine in ("ddp", "attached") else model
    estimator = GaussNewtonBartlett(noise="signs", chunks=2) if engine == "attached" else None
    optimizer = SophiaK(
        nets.groups(model),
        **SETTINGS,
        **settings,
        estimator=estimator,
        gradient_reduction="none" if engine == "by hand" else "mean",
    )
    if engine == "attached":
        optimizer.attach(wrapped)
    for step in range(STEPS):
        x, y = nets.batch(step)
        if engine != "attached":
            calls, rows = forwards(wrapped, x)
            wanted = step % 2 == 0 and settings.get("factors") != "gradients"
            assert optimizer.refresh_curvature(calls, rows=rows) == wanted
        optimizer.zero_grad()
        backward(wrapped, engine, x, y)
        optimizer.step()
    return engines.snapshot(model, optimizer)


def signless(snapshot):
    return {name: value.abs() if name.endswith("_basis") else value for name, value in snapshot.items()}


RULES = [
    {"basis": "both"},
    {"others": "curvature"},
    {"factors": "gradients", "diagonal": "gradients", "exponent": 0.5},
    {"diagonal": "gradients", "nu": 1.0},
    {"basis": "none", "nu": 0.2},
]


@pytest.mark.parametrize("engine", ["ddp", "by hand"])
@pytest.mark.parametrize("settings", RULES, ids=str)
def test_two_ranks_are_one_process_with_the_whole_batch(ranks, settings, engine):
    first, second = ranks.run(train, engine, settings)
    engines.assert_same(second, first)
    engines.assert_same(signless(first), signless(train("none", settings)), **CLOSE)


def test_attached_ranks_stay_alike(ranks):
    """Their own slices, their own noise, one state."""
    first, second = ranks.run(train, "attached", {"basis": "both"})
    engines.assert_same(second, first)
    assert first["first.weight.refreshes"] == 3


def refuse(when):
    """A refresh that is not finite on rank 1 alone, at the beginning or later."""
    model = nets.build()
    wrapped = engines.spread("ddp", model)
    optimizer = SophiaK(nets.groups(model), **SETTINGS, basis="both", others="curvature")
    for step in range(when):
        x, y = nets.batch(step)
        optimizer.refresh_curvature(forwards(wrapped, x)[0])
        backward(wrapped, "ddp", x, y)
        optimizer.step()
        optimizer.zero_grad()
    before = engines.snapshot(model, optimizer)
    x, _ = nets.batch(when)
    accepted = optimizer.refresh_curvature(forwards(wrapped, x, spoilt=1)[0])
    after = engines.snapshot(model, optimizer)
    engines.assert_same({name: after[name] for name in before}, before)
    # Handed over by hand, on rank 1 something that is not finite, or nothing of the right shape.
    estimates = [None] * len(nets.parameters(optimizer))
    estimates[1] = torch.full((nets.WIDTH,), torch.inf if engines.place()[0] == 1 else 1.0)
    by_hand = optimizer.update_curvature(estimates)
    estimates[1] = torch.ones(nets.WIDTH + engines.place()[0])
    with pytest.raises((ValueError, RuntimeError)) as caught:
        optimizer.update_curvature(estimates)
    return accepted, by_hand, optimizer.param_groups[0]["refused_refreshes"], optimizer.curvature_due, str(caught.value)


@pytest.mark.parametrize("when", [0, 2])
def test_what_one_rank_refuses_all_refuse(ranks, when):
    first, second = ranks.run(refuse, when)
    assert first[:4] == second[:4] == (False, False, 2, True)
    assert "failed on rank [1]" in first[4]
    assert "estimate 1 has shape (8,)" in second[4]
