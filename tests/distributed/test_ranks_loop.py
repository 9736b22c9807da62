"""The same explicit loop on one process, under DDP and under FSDP2, is the same training run."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from sophia import SophiaG
from sophia.curvature import GaussNewtonBartlett
from tests.distributed import engines

CLOSE = {"rtol": 1e-9, "atol": 1e-12}  # float64: only the order of sums may differ
ENGINES = [("ddp", 1), ("ddp", 2), ("ddp", 4), ("fsdp", 1), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]


def mean_loss(model, tokens, targets, rows):
    return F.cross_entropy(model(tokens[rows]).flatten(0, 1), targets[rows].flatten())


def train(engine, estimator):
    model = engines.wrap(engine, engines.build())
    optimizer = SophiaG(model.parameters(), lr=1e-2, curvature_interval=3, estimator=estimator)
    own = engines.own_rows()
    for step in range(7):
        tokens, targets = engines.batch(step)
        optimizer.refresh_curvature(lambda tokens=tokens: model(tokens[own]), rows=own)
        mean_loss(model, tokens, targets, own).backward()
        optimizer.step()
        optimizer.zero_grad()
    return engines.snapshot(model, optimizer)


@pytest.mark.parametrize("noise", ["labels", "signs"])
@pytest.mark.parametrize(("engine", "world"), ENGINES)
def test_any_number_of_ranks_gives_the_same_run(ranks, engine, world, noise):
    estimator = GaussNewtonBartlett(noise=noise, chunks=2)
    alone = train("none", estimator)
    found = ranks.run(train, engine, estimator, world=world)
    for snapshot in found:
        engines.assert_same(snapshot, alone, **CLOSE)
        engines.assert_same(snapshot, found[0])


def train_accumulating(engine):
    """Two micro-batches a step; gradients are reduced after the second only, the refresh takes both."""
    model = engines.wrap(engine, engines.build())
    optimizer = SophiaG(model.parameters(), lr=1e-2, curvature_interval=2)
    own = engines.own_rows()
    for step in range(5):
        micro = [engines.batch(2 * step + part) for part in range(2)]
        both = own + [row + engines.ROWS for row in own]
        optimizer.refresh_curvature([lambda tokens=tokens: model(tokens[own]) for tokens, _ in micro], rows=both)
        for last, (tokens, targets) in enumerate(micro):
            with reduction(model, engine, bool(last)):
                (mean_loss(model, tokens, targets, own) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return engines.snapshot(model, optimizer)


def reduction(model, engine, wanted):
    if engine == "fsdp":
        model.set_requires_gradient_sync(wanted)
    return model.no_sync() if engine == "ddp" and not wanted else contextlib.nullcontext()


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_gradient_accumulation(ranks, engine):
    alone = train_accumulating("none")
    for snapshot in ranks.run(train_accumulating, engine):
        engines.assert_same(snapshot, alone, **CLOSE)


def one_estimate(engine, settings, divide_factor=None):
    model = engines.wrap(engine, engines.build())
    if divide_factor is not None:
        model.set_gradient_divide_factor(divide_factor)
        model.block.set_gradient_divide_factor(divide_factor)
    # β2 = 0: the state is the estimate.
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0), **settings)
    tokens, _ = engines.batch()
    own = engines.own_rows()
    assert optimizer.refresh_curvature(lambda: model(tokens[own]), rows=own)
    return engines.snapshot(model, optimizer)


@pytest.mark.parametrize("world", [2, 4])
def test_an_engine_that_sums_gradients(ranks, world):
    alone = one_estimate("none", {})
    for snapshot in ranks.run(one_estimate, "fsdp", {"gradient_reduction": "sum"}, 1, world=world):
        engines.assert_same(snapshot, alone, **CLOSE)
    # Taken for means, sums inflate the curvature by the square of the number of ranks: the test can see it.
    inflated = ranks.run(one_estimate, "fsdp", {}, 1, world=world)[0]
    for name, value in inflated.items():
        if name.endswith("hessian"):
            torch.testing.assert_close(value, alone[name] * world**2, **CLOSE)


@pytest.mark.parametrize("world", [2, 4])
def test_without_an_engine_the_optimizer_reduces(ranks, world):
    alone = one_estimate("none", {})
    for snapshot in ranks.run(one_estimate, "none", {"gradient_reduction": "none"}, world=world):
        engines.assert_same(snapshot, alone, **CLOSE)


def use_the_spare_on_even_rows():
    """With `rows` dealt out in turn to two ranks, only the first of them uses the spare parameter."""
    rank, world = engines.place()
    model = engines.build(spare=True)
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0), gradient_reduction="none")
    tokens, _ = engines.batch()
    even, odd = list(range(0, engines.ROWS, 2)), list(range(1, engines.ROWS, 2))
    if world == 1:
        rows = even + odd
        optimizer.refresh_curvature(lambda: torch.cat((model(tokens[even]), model(tokens[odd], False))), rows=rows)
    else:
        rows = odd if rank else even
        optimizer.refresh_curvature(lambda: model(tokens[rows], not rank), rows=rows)
    return engines.snapshot(model, optimizer)


def test_a_parameter_that_only_some_ranks_use(ranks):
    alone = use_the_spare_on_even_rows()
    assert alone["spare.hessian"].sum() > 0
    for snapshot in ranks.run(use_the_spare_on_even_rows):
        engines.assert_same(snapshot, alone, **CLOSE)


def train_in_pairs():
    """Four ranks are two jobs of two: each pair has its own data, and must not hear of the other."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = pairs[rank // 2]
    model = engines.wrap("ddp", engines.build(), process_group=group)
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0), process_group=group)
    tokens, _ = engines.batch(rank // 2)
    own = list(range(rank % 2, engines.ROWS, 2))
    assert optimizer.refresh_curvature(lambda: model(tokens[own]), rows=own)
    return engines.snapshot(model, optimizer)


def alone_on(part):
    model = engines.build()
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0))
    tokens, _ = engines.batch(part)
    optimizer.refresh_curvature(lambda: model(tokens), rows=range(engines.ROWS))
    return engines.snapshot(model, optimizer)


def test_a_process_group_of_its_own(ranks):
    found = ranks.run(train_in_pairs, world=4)
    for rank, snapshot in enumerate(found):
        engines.assert_same(snapshot, alone_on(rank // 2), **CLOSE)
