"""Divisors are kept between refreshes: whatever they are made of, once it changes the next step knows."""

import copy

import pytest
import torch
from torch import nn

from sophia import SophiaK
from sophia.optim import matrix_bounds, matrix_step
from tests.sophia_k import drawn

SHAPE = (4, 6)


def fresh(**settings):
    """Two matrices alike, refreshed, after a step whose divisors are kept."""
    source = drawn.generator(3)
    params = [nn.Parameter(drawn.normal(SHAPE, source)) for _ in range(2)]
    for p in params:
        p.grad = drawn.normal(SHAPE, source)
    optimizer = SophiaK(params, lr=0.1, exponent=0.5, orthogonalize=0, update_rms=None, **settings)
    assert optimizer.update_curvature([0.3 * drawn.normal((5, *SHAPE), source) for _ in params])
    optimizer.step()
    return params, optimizer


def refold(params, optimizer):
    source = drawn.generator(4)
    assert optimizer.update_curvature([3 * drawn.normal((5, *SHAPE), source) for _ in params])


def load(params, optimizer):
    saved = copy.deepcopy(optimizer.state_dict())
    for own in saved["state"].values():
        own["hessian"] *= 9
    optimizer.load_state_dict(saved)


CHANGES = {
    "nothing": lambda params, optimizer: None,
    "gamma": lambda params, optimizer: optimizer.param_groups[0].update(gamma=2.0),
    "eps": lambda params, optimizer: optimizer.param_groups[0].update(eps=0.5),
    "exponent": lambda params, optimizer: optimizer.param_groups[0].update(exponent=1.0),
    "rtol": lambda params, optimizer: optimizer.param_groups[0].update(rtol=0.9),
    "curvature": refold,
    "loaded": load,
    "in place": lambda params, optimizer: optimizer.state[params[1]]["hessian"].mul_(9),
    "replaced": lambda params, optimizer: optimizer.state[params[1]].update(
        hessian=9 * optimizer.state[params[1]]["hessian"]
    ),
    "fewer": lambda params, optimizer: setattr(params[0], "grad", None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_is_that_of_an_optimizer_that_keeps_nothing(change, monkeypatch):
    found = []
    for largest in (matrix_bounds.LARGEST, 0):
        monkeypatch.setattr(matrix_bounds, "LARGEST", largest)
        params, optimizer = fresh()
        CHANGES[change](params, optimizer)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        found.append([p.detach() - old for p, old in zip(params, before, strict=True)])
    for kept, computed in zip(*found, strict=True):
        assert torch.equal(kept, computed)


def test_divisors_kept_in_bf16_are_those_computed_anew(monkeypatch):
    """Where quotients are taken in bf16, rounding a divisor once or in every step is the same."""
    found = []
    for largest in (matrix_bounds.LARGEST, 0):
        monkeypatch.setattr(matrix_bounds, "LARGEST", largest)
        params, optimizer = fresh(product_dtype=torch.bfloat16)
        optimizer.step()
        found.append([p.detach().clone() for p in params])
    for kept, computed in zip(*found, strict=True):
        assert torch.equal(kept, computed)


def test_a_step_hangs_on_no_company(monkeypatch):
    """Matrices that are turned together or one by one, as the cache's size has it, move alike."""
    found, together = [], []
    unscaled = matrix_step.unscaled
    monkeypatch.setattr(matrix_step, "unscaled", lambda x, *rest: together.append(len(x)) or unscaled(x, *rest))
    for most in (matrix_step.TOGETHER_ON_CPU, 1):
        monkeypatch.setattr(matrix_step, "TOGETHER_ON_CPU", most)
        params, _ = fresh()
        found.append([p.detach().clone() for p in params])
    assert together == [2, 1, 1]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_divisors_are_computed_once_between_refreshes(monkeypatch):
    calls = []
    bound = matrix_bounds.bound
    monkeypatch.setattr(matrix_bounds, "bound", lambda *given: calls.append(1) or bound(*given))
    params, optimizer = fresh()
    optimizer.step()
    optimizer.step()
    assert len(calls) == 1
    refold(params, optimizer)
    optimizer.step()
    optimizer.step()
    assert len(calls) == 2


def test_copies_carry_no_divisors(monkeypatch):
    seen = []
    unscaled = matrix_step.unscaled
    monkeypatch.setattr(matrix_step, "unscaled", lambda x, *rest: seen.append(rest[0]) or unscaled(x, *rest))
    params, optimizer = fresh()
    again = copy.deepcopy(optimizer)
    assert "_bounds" not in optimizer.__getstate__()
    for one in (optimizer, again):
        for p in one.param_groups[0]["params"]:
            p.grad = torch.ones(SHAPE, dtype=p.dtype)
        one.step()
    assert seen[0] is seen[1]
    assert seen[1] is not seen[2]
    assert torch.equal(seen[1], seen[2])
    optimizer.state[params[0]]["hessian"].mul_(9)
    optimizer.step()
    again.step()
    assert not torch.equal(seen[3], seen[4])
    assert seen[4] is seen[2]
