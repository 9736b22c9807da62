"""Signum, which is Lion with equal decays, is Sophia where curvature is zero, with half of its memory."""

import pytest
import torch

from sophia import Sophia
from sophia.optim.lion import Lion


def run(optimizer, params, *, steps=30, skips=()):
    draw = torch.Generator().manual_seed(7)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw, dtype=p.dtype)
        if isinstance(optimizer, Sophia) and optimizer.curvature_due:
            optimizer.update_curvature([torch.zeros_like(p) for p in params])
        if skips:
            optimizer.found_inf = torch.tensor(float(step in skips))
        optimizer.step()
    return [p.detach() for p in params]


def parameters(dtype):
    draw = torch.Generator().manual_seed(8)
    return [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in ((5, 4), (3,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_it_is_sophia_without_curvature(dtype, decay):
    """Within the last bit by Sophia's plain operations, within rounding by its fast ones, which take other units."""
    ours, theirs, others = (parameters(dtype) for _ in range(3))
    found = run(Lion(ours, betas=(0.9, 0.9), weight_decay=decay), ours)
    sophia = run(Sophia(theirs, betas=(0.9, 0.99), weight_decay=decay, foreach=True), theirs)
    for a, b in zip(found, sophia, strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    for a, b in zip(found, run(Sophia(others, betas=(0.9, 0.99), weight_decay=decay), others), strict=True):
        torch.testing.assert_close(a, b)


def test_it_keeps_one_average():
    params = parameters(torch.float32)
    optimizer = Lion(params)
    run(optimizer, params, steps=2)
    assert [set(optimizer.state[p]) for p in params] == [{"exp_avg"}] * 2


def test_a_flag_on_the_device_leaves_a_step_out():
    ours, theirs = parameters(torch.float32), parameters(torch.float32)
    one, other = Lion(ours, weight_decay=0.1), Lion(theirs, weight_decay=0.1)
    run(one, ours, steps=3, skips=(2,))
    run(other, theirs, steps=2)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(one.state[p]["exp_avg"], other.state[q]["exp_avg"])


def test_what_has_no_gradient_stays_and_a_closure_is_run():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = Lion([a, b], lr=0.1)

    def closure():
        optimizer.zero_grad()
        (loss := a.sum()).backward()
        return loss.item()

    assert optimizer.step(closure) == 2.0
    assert a.tolist() == pytest.approx([0.9, 0.9])
    assert b.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"lr": float("nan")}, {"betas": (0.9, 1.0)}, {"weight_decay": -0.1}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Lion([torch.ones(1, requires_grad=True)], **wrong)
