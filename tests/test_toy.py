"""The paper's motivating examples (section 2.1): a saddle that attracts Newton, and independence of conditioning."""

import pytest
import torch

from sophia import Sophia

START = (0.1, 0.0)


def toy_loss(theta):
    a, b = theta.unbind()
    return 8 * (a - 1) ** 2 * (1.3 * a**2 + 2 * a + 1) + 0.5 * (b - 4) ** 2


def derivatives(loss, theta):
    gradient = torch.func.grad(loss)(theta)
    return gradient, torch.func.hessian(loss)(theta).diagonal()


def descend(loss, start, steps, *, lr, curvature=True):
    """Losses along the path of Sophia without averaging, from exact derivatives; curvature=False is sign descent."""
    theta = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = Sophia([theta], lr=lr, betas=(0, 0), gamma=1.0, weight_decay=0, curvature_interval=1)
    losses = []
    for _ in range(steps):
        theta.grad, diagonal = derivatives(loss, theta.detach())
        optimizer.update_curvature([diagonal if curvature else torch.zeros_like(diagonal)])
        optimizer.step()
        losses.append(loss(theta.detach()).item())
    return losses, theta.detach()


def first_below(losses, bound):
    return next((step for step, loss in enumerate(losses, start=1) if loss < bound), None)


def test_sophia_reaches_the_minimum_at_step_11():
    losses, theta = descend(toy_loss, START, 60, lr=0.5)
    assert first_below(losses, 1e-3) == 11
    torch.testing.assert_close(theta, torch.tensor([1.0, 4.0], dtype=torch.float64), atol=1e-6, rtol=0)


def test_newton_runs_into_the_saddle():
    theta = torch.tensor(START, dtype=torch.float64)
    for _ in range(50):
        gradient, diagonal = derivatives(toy_loss, theta)
        theta = theta - gradient / diagonal
    torch.testing.assert_close(theta, torch.tensor([0.0, 4.0], dtype=torch.float64), atol=1e-6, rtol=0)


def test_sign_descent_bounces():
    losses, _ = descend(toy_loss, START, 200, lr=0.3, curvature=False)
    assert first_below(losses, 1e-3) is None
    assert min(losses[-20:]) > 1e-3


def test_adam_takes_about_59_steps():
    theta = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = torch.optim.Adam([theta], lr=0.3)
    losses = []
    for _ in range(100):
        theta.grad, _ = derivatives(toy_loss, theta.detach())
        optimizer.step()
        losses.append(toy_loss(theta.detach()).item())
    assert first_below(losses, 1e-3) == pytest.approx(59, abs=5)


def quadratic(condition):
    scales = torch.tensor([1.0, condition], dtype=torch.float64)
    return lambda theta: 0.5 * (scales * (theta - 3) ** 2).sum()


def test_clipped_newton_takes_the_same_steps_for_any_condition_number():
    steps = {}
    for condition in (1.0, 1e1, 1e2, 1e3, 1e4):
        losses, _ = descend(quadratic(condition), (0.0, 0.0), 200, lr=0.5)
        steps[condition] = first_below([loss / condition for loss in losses], 1e-9)
    assert len(set(steps.values())) == 1, steps


def test_sign_descent_needs_more_steps_for_worse_conditioning():
    # With the step size that just reaches a loss of 1e-2, steps grow as the root of the condition number.
    needed = []
    for condition in (1.0, 1e2, 1e4):
        lr = (2e-2 / condition) ** 0.5
        losses, _ = descend(quadratic(condition), (0.0, 0.0), int(4 / lr), lr=lr, curvature=False)
        needed.append(first_below(losses, 1.1e-2))
    assert needed[1] / needed[0] == pytest.approx(10, rel=0.15)
    assert needed[2] / needed[1] == pytest.approx(10, rel=0.15)
