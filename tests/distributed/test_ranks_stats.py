"""`stats(reduce=True)` speaks of the whole model, and mixed precision leaves the curvature sane."""

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F

from sophia import SophiaG
from tests.distributed import engines

ENGINES = [("ddp", 2), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4)]


def advance(model, optimizer, steps):
    own = engines.own_rows()
    for step in range(steps):
        tokens, targets = engines.batch(step)
        optimizer.refresh_curvature(lambda tokens=tokens: model(tokens[own]), rows=own)
        F.cross_entropy(model(tokens[own]).flatten(0, 1).float(), targets[own].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def statistics(engine):
    """After five steps with one refused refresh; and, of this rank's part, the sums that they are made of."""
    model = engines.wrap(engine, engines.build())
    # β2 and γ such that some of the coordinates are clipped and some are not.
    optimizer = SophiaG(model.parameters(), lr=1e-2, betas=(0.9, 0.5), gamma=2.0, curvature_interval=3)
    advance(model, optimizer, 3)
    tokens, _ = engines.batch()
    assert not optimizer.refresh_curvature(lambda: model(tokens[engines.own_rows()]) * float("nan"))
    advance(model, optimizer, 2)
    return [{k: v.item() for k, v in optimizer.stats(reduce=reduce).items()} for reduce in (True, False)]


@pytest.mark.parametrize(("engine", "world"), ENGINES)
def test_reduced_statistics_are_the_single_process_figures(ranks, engine, world):
    alone, unreduced = statistics("none")
    assert alone == unreduced
    assert 0.1 < alone["clip_fraction"] < 0.9
    assert (alone["curvature_age"], alone["refused_refreshes"]) == (2, 1)
    found = ranks.run(statistics, engine, world=world)
    for reduced, own in found:
        assert reduced == pytest.approx(alone, rel=1e-5)
        assert (own == pytest.approx(alone, rel=1e-5)) == (engine == "ddp")
    if engine == "fsdp":  # the shards, without an overlap or a gap
        for norm in ("momentum_norm", "curvature_norm"):
            assert sum(own[norm] ** 2 for _, own in found) == pytest.approx(alone[norm] ** 2, rel=1e-5)


def statistics_of_one_rank():
    """Without `reduce` no rank waits for another."""
    model = engines.wrap("fsdp", engines.build())
    optimizer = SophiaG(model.parameters())
    advance(model, optimizer, 1)
    return optimizer.stats()["clip_fraction"].item() if engines.place()[0] == 0 else None


def test_unreduced_statistics_are_no_collective_call(ranks):
    first, second = ranks.run(statistics_of_one_rank)
    assert 0 <= first <= 1
    assert second is None


def curvature_under(policy):
    model = engines.wrap("fsdp", engines.build(torch.float32), **({} if policy is None else {"mp_policy": policy}))
    optimizer = SophiaG(model.parameters(), lr=1e-3, betas=(0.9, 0.0), curvature_interval=1)
    own = engines.own_rows()
    total = {}
    for _ in range(40):  # lr and gradients are zero: the same model each time, other noise
        assert optimizer.refresh_curvature(lambda: model(engines.batch()[0][own]), rows=own)
        optimizer.step()
        for name, value in engines.snapshot(model, optimizer).items():
            if name.endswith("hessian"):
                assert value.dtype == torch.float32
                total[name] = total.get(name, 0) + value
    advance(model, optimizer, 3)
    assert all(value.isfinite().all() for value in engines.snapshot(model, optimizer).values())
    return total


@pytest.fixture(scope="module")
def exact(ranks):
    return ranks.run(curvature_under, None)[0]


@pytest.mark.parametrize(
    ("dtype", "reduce_dtype"), [(torch.bfloat16, torch.float32), (torch.bfloat16, None), (torch.float16, None)]
)
def test_mixed_precision_keeps_the_size_of_the_curvature(ranks, exact, dtype, reduce_dtype):
    """In the mean of many estimates, tensor by tensor. Labels differ where low precision tips a sample over."""
    found = ranks.run(curvature_under, MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype))[0]
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        assert 0.8 < found[name].sum() / value.sum() < 1.25, name
