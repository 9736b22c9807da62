"""Hutchinson's estimator against the exact diagonal of the Hessian."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia.curvature import Hutchinson
from tests import exact

SAMPLES = 1500


@functools.cache
def problem():
    model, tokens, targets = exact.build(dtype=torch.float64)
    # At the initial weights the Hessian's diagonal nearly cancels in sum: a few steps give it a sign worth testing.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(model, tokens, targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, tokens, targets, exact.exact_hessian(model, lambda call: loss_of(call, tokens, targets))


def loss_of(call, tokens, targets):
    return F.cross_entropy(call(tokens).flatten(0, 1), targets.flatten())


def estimate(estimator, step=0, **settings):
    model, tokens, targets, _ = problem()
    forward = functools.partial(loss_of, model, tokens, targets)
    return exact.flat(estimator.estimate([forward], list(model.parameters()), exact.refresh(step=step, **settings)))


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_unbiased_for_the_hessian_diagonal(noise):
    model, _, _, truth = problem()
    drawn = torch.stack([estimate(Hutchinson(noise=noise), step=t) for t in range(SAMPLES)])
    exact.assert_unbiased(drawn, truth, model)
    with pytest.raises(AssertionError):
        exact.assert_unbiased(drawn * 1.1, truth, model)
    assert (drawn < 0).any()  # the Hessian is not positive, and neither are its estimates


def test_trap_8_rademacher_noise_has_both_signs_and_less_variance():
    _, _, _, truth = problem()
    gaussian = torch.stack([estimate(Hutchinson(), step=t) for t in range(300)])
    signs = torch.stack([estimate(Hutchinson(noise="rademacher"), step=t) for t in range(300)])
    # With u always −1 the estimate would be the row sums of the Hessian, the same at every step.
    assert signs.std(0).max() > 0
    assert exact.relative_squared_error(signs, truth) < exact.relative_squared_error(gaussian, truth)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_finite_differences_equal_double_backward(noise):
    model, _, _, _ = problem()
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(5):
        precise = estimate(Hutchinson(noise=noise, product="double_backward"), step)
        difference = estimate(Hutchinson(noise=noise, product="finite_difference"), step)
        assert (difference - precise).norm() < 1e-3 * precise.norm()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_finite_differences_in_fp32():
    model, tokens, targets = exact.build(dtype=torch.float32)
    forward = functools.partial(loss_of, model, tokens, targets)
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    for step in range(5):
        kinds = [
            exact.flat(Hutchinson(product=product).estimate([forward], params, exact.refresh(step=step)))
            for product in ("double_backward", "finite_difference")
        ]
        assert (kinds[1] - kinds[0]).norm() < 1e-3 * kinds[0].norm()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_attention_is_switched_to_its_math_form():
    """The fast attention kernel of the forward pass has no second derivative; nothing is asked of the user."""
    model, tokens, targets, _ = problem()
    loss = loss_of(model, tokens, targets)
    params = list(model.parameters())
    grads = torch.autograd.grad(loss, params, create_graph=True)
    with pytest.raises(RuntimeError, match="is not implemented"):
        torch.autograd.grad(sum(g.sum() for g in grads), params)
    assert estimate(Hutchinson(product="double_backward")).isfinite().all()


class OnlyOnce(torch.autograd.Function):
    """An operation as custom kernels are: its backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.cos()


def test_auto_falls_back_to_finite_differences():
    theta = nn.Parameter(torch.randn(20, dtype=torch.float64))

    def forward():
        return OnlyOnce.apply(theta).sum()

    result = Hutchinson().estimate([forward], [theta], exact.refresh())[0]
    u = exact.flat(Hutchinson().estimate([lambda: theta.square().sum() / 2], [theta], exact.refresh())).sqrt()
    torch.testing.assert_close(result, -theta.detach().sin() * u.square(), rtol=1e-3, atol=1e-4)
    with pytest.raises(RuntimeError, match="finite_difference"):
        Hutchinson(product="double_backward").estimate([forward], [theta], exact.refresh())


def test_finite_differences_refuse_low_precision_parameters():
    theta = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"bfloat16.*fp32"):
        Hutchinson(product="finite_difference").estimate([lambda: theta.square().sum()], [theta], exact.refresh())


def test_several_forwards_count_equally():
    model, tokens, targets, _ = problem()
    params = list(model.parameters())
    halves = [functools.partial(loss_of, model, x, y) for x, y in zip(tokens.split(4), targets.split(4), strict=True)]
    for product in ("double_backward", "finite_difference"):
        estimator = Hutchinson(product=product)
        both = exact.flat(estimator.estimate(halves, params, exact.refresh(step=3)))
        torch.testing.assert_close(both, estimate(estimator, step=3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("product", ["double_backward", "finite_difference"])
def test_the_loss_scale_cancels(product):
    plain = estimate(Hutchinson(product=product), step=2)
    torch.testing.assert_close(estimate(Hutchinson(product=product), step=2, scale=2.0**-8), plain)


def test_linear_losses_have_zero_curvature_and_unused_parameters_none():
    theta, spare = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    for product in ("double_backward", "finite_difference"):
        estimates = Hutchinson(product=product).estimate([theta.sum], [theta, spare], exact.refresh())
        assert torch.allclose(estimates[0], torch.zeros(3), atol=1e-4)
        assert estimates[1] is None


def test_rows_have_no_meaning():
    with pytest.raises(ValueError, match="rows"):
        estimate(Hutchinson(), rows=torch.arange(8))
