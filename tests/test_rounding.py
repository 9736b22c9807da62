"""Stochastic rounding: the noise of the specification on every path, no bias, nothing lost, resumes alike."""

import copy

import pytest
import torch
from torch import nn

from sophia import Sophia
from sophia.optim import rounding, update

BF16 = torch.bfloat16
PATHS = {"sliced": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
WORD = (1 << 32) - 1


def by_the_book(value, i, key):
    """One element in plain integers, as the specification has it."""
    x = (i * 0x9E3779B1 + key) & WORD
    x ^= x >> 16
    x = x * 0x85EBCA6B & WORD
    x ^= x >> 13
    x = x * 0xC2B2AE35 & WORD
    x ^= x >> 16
    bits = torch.tensor(value, dtype=torch.float32).view(torch.int32).item() & WORD
    return (bits + (x & 0xFFFF)) >> 16 & 0xFFFF


def words(tensor):
    return (tensor.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF).flatten().tolist()


def rounded(value, key=0, step=0, **settings):
    out = torch.empty_like(value, dtype=BF16)
    rounding.write_(out, value, rounding.step_key(key, step), **settings)
    return out


def test_the_noise_is_that_of_the_specification():
    value = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    key, step = rounding.tensor_key(7, 3, rounding.HESSIAN), 123456
    full = (key + step * 0x85EBCA77) & WORD
    expected = [by_the_book(v, i, full) for i, v in enumerate(value.tolist())]
    assert words(rounded(value, key, step)) == expected
    assert words(rounded(value, key, torch.tensor(step))) == expected  # t on the device
    # A checkpoint of today must go on as it would have today.
    assert [by_the_book(1.001, i, 42) for i in range(6)] == [16256, 16256, 16256, 16256, 16257, 16256]
    assert [by_the_book(1.005, i, 42) for i in range(8)] == [16257, 16257, 16257, 16257, 16257, 16257, 16256, 16257]


@pytest.mark.parametrize("step", [0, 1, 2**31, 2**40 + 3])
def test_key_on_the_device_is_the_key_on_the_host(step):
    for key in (0, 1, WORD):
        assert rounding.step_key(key, torch.tensor(step)).item() == rounding.step_key(key, step)


def test_keys_differ_by_all_that_they_are_made_of():
    keys = {rounding.tensor_key(*parts) for parts in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0, 1)]}
    assert len(keys) == 5
    assert all(0 <= key <= WORD for key in keys)


def test_elements_are_numbered_by_their_memory():
    """So a transposed tensor, and one that is rounded in parts, get the noise of the whole."""
    value = torch.randn(60, 40)
    whole = rounded(value)
    out = torch.empty(60, 40, dtype=BF16)
    rounding.write_(out.t(), value.t(), rounding.step_key(0, 0))
    assert torch.equal(out, whole)
    out = torch.empty(5 + 60 * 40, dtype=BF16)[5:].view(60, 40)
    for part, own in ((out[:33], value[:33]), (out[33:, :7], value[33:, :7]), (out[33:, 7:], value[33:, 7:])):
        rounding.write_(part, own, rounding.step_key(0, 0), origin=5)
    assert torch.equal(out, whole)


def test_what_bfloat16_holds_stays():
    exact = torch.randn(1000).to(BF16)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 2.0**-133, float("nan")]).repeat(200)
    for step in range(5):
        assert torch.equal(rounded(exact.float(), step=step), exact)
        result = rounded(special, step=step)
        assert torch.equal(torch.signbit(result[:-1:6]), torch.zeros(200, dtype=torch.bool))
        assert torch.signbit(result[1::6]).all()  # the mark of curvature that no estimate has reached
        assert torch.equal(result.nan_to_num(7.0), special.to(BF16).nan_to_num(7.0))
    # The NaN of CUDA's arithmetic has all bits set: noise would wrap it.
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert all(rounded(nan, step=step).isnan().all() for step in range(20))


def test_rounding_is_up_or_down_by_one_and_right_on_average():
    value = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    steps = 400
    total = torch.zeros(4000, dtype=torch.float64)
    below = (value.view(torch.int32) & -0x10000).view(torch.float32)
    above = ((value.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    for step in range(steps):
        result = rounded(value, 5, step).float()
        assert ((result == below) | (result == above)).all()
        total += result
    # The mean's error in units of its standard deviation, which is that of coin tosses.
    share = ((value - below) / (above - below)).double()
    deviation = ((above - below).double().abs() * (share * (1 - share) / steps).sqrt()).clamp_min(1e-12)
    z = (total / steps - value) / deviation
    assert z.abs().max() < 5.5
    assert abs(float(z.mean())) < 4 / 4000**0.5
    assert 0.9 < float(z.square().mean()) < 1.1


# ---- in the optimizer


def make(path, params=None, **settings):
    generator = torch.Generator().manual_seed(2)
    if params is None:
        params = [nn.Parameter(torch.randn(s, generator=generator)) for s in ((7, 5), (0, 3), (300,), ())]
        params.append(nn.Parameter(torch.randn(20, 30, generator=generator).t()))
    return Sophia(params, lr=0.01, state_dtype=BF16, **PATHS[path], **settings), params


def advance(optimizer, params, steps, start=0):
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(100 + t)
        if t % 3 == 0:
            optimizer.update_curvature([torch.rand(p.shape, generator=generator) * 50 for p in params])
        for p in params:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        optimizer.step()


def test_every_path_rounds_with_the_same_noise(monkeypatch):
    """fp32 arithmetic may differ in the last bit, which turns few roundings: were the noise another, half of them."""
    monkeypatch.setattr(update, "BLOCK", 64)  # so that slices begin within tensors
    found = {}
    for path in PATHS:
        optimizer, params = make(path)
        advance(optimizer, params, 4)
        found[path] = [optimizer.state[p][name] for p in params for name in ("exp_avg", "hessian")]
        assert {t.dtype for t in found[path]} == {BF16}
    for path in ("foreach", "fused"):
        different = sum(int((a != b).sum()) for a, b in zip(found["sliced"], found[path], strict=True))
        assert different <= 0.01 * sum(t.numel() for t in found["sliced"])


@pytest.mark.parametrize("path", PATHS)
def test_momentum_is_rounded_with_its_key_at_t(path):
    optimizer, params = make(path, seed=11)
    advance(optimizer, params, 2)
    before = optimizer.state[params[2]]["exp_avg"].float()
    hessian = optimizer.state[params[2]]["hessian"].float()
    advance(optimizer, params, 1, start=2)
    exact = before.lerp(params[2].grad, 1 - 0.96)
    expected = rounded(exact, rounding.tensor_key(11, 2, rounding.EXP_AVG), step=2)
    assert (optimizer.state[params[2]]["exp_avg"] != expected).sum() <= 3
    assert torch.equal(optimizer.state[params[2]]["hessian"].float(), hessian)  # no refresh at t = 2
    estimate = torch.rand_like(hessian) * 50
    optimizer.update_curvature([None, None, estimate, None, None])
    exact = hessian.lerp(estimate, 1 - 0.99)
    expected = rounded(exact, rounding.tensor_key(11, 2, rounding.HESSIAN), step=3)
    assert (optimizer.state[params[2]]["hessian"] != expected).sum() <= 3


@pytest.mark.parametrize("path", PATHS)
def test_small_changes_are_not_lost(path):
    """m near 1 and g of 1.05: each step adds less than half of bfloat16's spacing there. To nearest, m never moves."""
    p = nn.Parameter(torch.zeros(4096))
    optimizer, _ = make(path, [p])
    optimizer.update_curvature([torch.ones_like(p)])
    optimizer.step()  # without a gradient: creates the state
    state = optimizer.state[p]
    for name, target in (("exp_avg", 1.05), ("hessian", 1.2)):
        state[name].fill_(1.0)
        stalled, exact = torch.ones(1, dtype=BF16), 1.0
        weight = 1 - 0.96 if name == "exp_avg" else 1 - 0.99
        for _ in range(20):
            if name == "exp_avg":
                p.grad = torch.full_like(p, target)
                optimizer.step()
            else:
                optimizer.param_groups[0]["clock"] += 1
                optimizer.update_curvature([torch.full_like(p, target)])
            exact += weight * (target - exact)
            stalled.copy_(stalled.float().lerp(torch.tensor([target]), weight))
        assert stalled.item() == 1.0
        assert state[name].float().mean().item() == pytest.approx(exact, abs=0.001)
        assert exact > 1.02


@pytest.mark.parametrize("path", PATHS)
def test_a_resumed_run_is_the_same_run(path):
    optimizer, params = make(path, seed=3)
    advance(optimizer, params, 4)
    saved, at = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    advance(optimizer, params, 3, start=4)
    again, others = make(path, [nn.Parameter(p) for p in at], seed=8)  # the seed comes from the state dict
    again.load_state_dict(saved)
    advance(again, others, 3, start=4)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["exp_avg"], again.state[q]["exp_avg"])
        assert torch.equal(optimizer.state[p]["hessian"], again.state[q]["hessian"])


@pytest.mark.parametrize("path", PATHS)
def test_unreached_curvature_keeps_its_mark(path):
    optimizer, params = make(path)
    for t in range(3):
        optimizer.update_curvature([torch.ones_like(params[0]), None, None, None, None])
        for p in params:
            p.grad = torch.ones_like(p) * 0.37 * (t + 1)
        before = [p.detach().clone() for p in params]
        with pytest.warns(match="hold still") if t == 0 else torch.no_grad():
            optimizer.step()
        assert not torch.equal(params[0], before[0])
        assert all(torch.equal(p, q) for p, q in zip(params[1:], before[1:], strict=True))
    again, _ = make(path, params)
    again.load_state_dict(optimizer.state_dict())
    assert [p in again._reach for p in params] == [True, True, False, False, False]  # the second has no elements
    # Momentum that only builds up is rounded in the same way.
    exact = rounded(torch.full((300,), 0.37 * (1 - 0.96)), rounding.tensor_key(0, 2, rounding.EXP_AVG))
    assert len(exact.unique()) == 2
