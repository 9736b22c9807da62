"""On one process each parameter's gradient is squared when the backward pass has it: they never exist together."""

import functools
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sophia.curvature import GaussNewtonBartlett
from sophia.optim.replicas import Replicas
from tests import exact

CLOSE = {"rtol": 1e-12, "atol": 1e-15}  # float64


class Twice(nn.Module):
    """One layer in two segments; and a parameter added through a view, whose gradient is memory that others need."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.shift, self.late = nn.Parameter(torch.randn(30)), nn.Parameter(torch.randn(30))
        self.layer, self.head = nn.Linear(5, 5), nn.Linear(5, 7)
        self.reentrant = reentrant
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = x + self.shift.view(6, 5)
        for _ in range(2):
            if self.reentrant is None:
                x = self.layer(x).tanh()
            else:
                x = checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=self.reentrant)
        return self.head(x + self.late.view_as(x))


def build(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Twice(**settings).double(), torch.randn(6, 5, dtype=torch.float64)


def estimate(model, x, chunks=3, **settings):
    estimator = GaussNewtonBartlett(chunks=chunks)
    return estimator.estimate([lambda: model(x)], list(model.parameters()), exact.refresh(**settings))


def assert_same(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or CLOSE))


@pytest.fixture
def whole(monkeypatch):
    """Estimates from whole sets of gradients, as under an engine."""

    def run(*args, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(Replicas, "alone", False)
            return estimate(*args, **settings)

    return run


@pytest.mark.parametrize("scale", [1.0, 2.0**-8])
@pytest.mark.parametrize("chunks", [1, 3])
def test_the_squares_are_those_of_whole_gradients(whole, chunks, scale):
    model, x = build()
    assert_same(estimate(model, x, chunks, scale=scale), whole(model, x, chunks))


def test_parameters_in_low_precision(whole):
    model, x = build()
    model, x = model.bfloat16(), x.bfloat16()
    found = estimate(model, x)
    assert all(e.dtype == torch.float32 for e in found)
    assert_same(found, whole(model, x), rtol=1e-6, atol=0)


def test_gradients_never_exist_together():
    model, x = build()
    params, held = list(model.parameters()), []
    hooks = [
        p.register_post_accumulate_grad_hook(lambda _: held.append(sum(p.grad is not None for p in params)))
        for p in params
    ]
    estimate(model, x)
    for hook in hooks:
        hook.remove()
    assert held == [1] * len(params) * 3


@pytest.mark.parametrize("alone", [True, False])
def test_no_graph_is_left_when_the_next_forward_begins(monkeypatch, alone):
    monkeypatch.setattr(Replicas, "alone", alone)
    model, x = build()
    outputs, alive = [], []

    def forward():
        alive.append([ref() is not None for ref in outputs])
        logits = model(x)
        outputs.append(weakref.ref(logits))
        return logits

    GaussNewtonBartlett().estimate([forward] * 3, list(model.parameters()), exact.refresh())
    assert alive == [[], [False], [False, False]]


def test_nothing_is_left_behind():
    model, x = build()
    before = [torch.randn_like(p) for p in model.parameters()]
    for p, gradient in zip(model.parameters(), before, strict=True):
        p.grad = gradient
    estimate(model, x)
    assert all(p.grad is gradient for p, gradient in zip(model.parameters(), before, strict=True))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_failing_forward_leaves_no_hook():
    model, x = build()
    with pytest.raises(ZeroDivisionError):
        GaussNewtonBartlett().estimate([lambda: model(x), lambda: 1 / 0], list(model.parameters()), exact.refresh())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_gradient_that_comes_in_parts_is_not_squared_in_parts(reentrant):
    """A reentrant checkpoint accumulates on its own; where a parameter is in two of them, gradients are kept whole."""
    plain, x = build()
    model, _ = build(reentrant=reentrant)
    x.requires_grad_()
    assert_same(estimate(model, x), estimate(plain, x))
    # Begun again after the first chunk, or not at all.
    assert model.calls == plain.calls + (1 if reentrant else 0)


def test_an_error_of_another_kind_is_not_swallowed():
    model, x = build()

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        GaussNewtonBartlett().estimate(
            [functools.partial(lambda: Broken.apply(model(x)))], list(model.parameters()), exact.refresh()
        )
