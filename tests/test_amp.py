"""Mixed precision: autocast, GradScaler, the curvature's own loss scale, and parameters in fp16 and bf16."""

import contextlib
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sophia import Sophia, SophiaG, SophiaH
from sophia.curvature import GaussNewtonBartlett, Hutchinson
from tests.models import Classifier, Snapshot, assert_same, curvature, examples, same, seeded

LOW = [torch.bfloat16, torch.float16]


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


def relative(value, reference):
    value, reference = flat(value), flat(reference)
    return float((value - reference).norm() / reference.norm())


# ---- autocast and GradScaler


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_estimate_under_autocast_is_that_of_fp32_but_for_rounding(kind, dtype):
    def estimate(enabled):
        model = seeded(lambda: Classifier(dropout=0))
        # Signs and not labels: rounding moves them a little where it would draw another label.
        noise = {"estimator": GaussNewtonBartlett(noise="signs")} if kind is SophiaG else {}
        optimizer = kind(model.parameters(), **noise)
        with torch.autocast("cpu", dtype, enabled=enabled):
            assert optimizer.refresh_curvature(lambda: model(x) if kind is SophiaG else F.cross_entropy(model(x), y))
        assert {h.dtype for h in curvature(optimizer)} == {torch.float32}
        return curvature(optimizer)

    x, y = examples()
    error = relative(estimate(True), estimate(False))
    assert 0 < error < 16 * torch.finfo(dtype).eps


def test_finite_differences_are_right_or_refused_when_forward_opens_its_own_autocast_region():
    def loss(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return F.cross_entropy(model(x), y)

    model, (x, y) = seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))), examples()
    one, other = (SophiaH(model.parameters(), estimator=Hutchinson(product="finite_difference")) for _ in range(2))
    assert one.refresh_curvature(lambda: loss(False))
    with contextlib.suppress(ValueError, RuntimeError):
        other.refresh_curvature(lambda: loss(True))
    if other.state:
        assert relative(curvature(other), curvature(one)) < 0.05


@pytest.mark.parametrize("dtype", LOW)
def test_training_under_autocast_with_gradscaler(dtype):
    model = seeded(lambda: Classifier(dropout=0))
    optimizer = SophiaG(model.parameters(), lr=2e-2, curvature_interval=3)
    # So high that fp16 overflows at first: GradScaler withholds those steps and halves.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    x, y = examples()
    losses, withheld = [], 0
    for _ in range(40):
        with torch.autocast("cpu", dtype):
            optimizer.refresh_curvature(lambda: model(x))
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        before, scale = optimizer.param_groups[0]["clock"], scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped = scaler.get_scale() < scale
        withheld += skipped
        assert optimizer.param_groups[0]["clock"] == before + (not skipped)
        optimizer.zero_grad()
        losses.append(loss.item())
    steps = 40 - withheld
    assert (withheld > 0) == (dtype is torch.float16)
    assert optimizer.param_groups[0]["clock"] == steps
    assert optimizer.param_groups[0]["accepted_refreshes"] == math.ceil(steps / 3)
    assert losses[-1] < 0.5 * losses[0]


def test_refresh_stays_accepted_over_a_withheld_step():
    model = seeded(Classifier)
    optimizer, scaler = SophiaG(model.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0)
    x, y = examples()
    assert optimizer.refresh_curvature(lambda: model(x))
    known = [h.clone() for h in curvature(optimizer)]
    for _ in range(3):
        assert not optimizer.refresh_curvature(lambda: pytest.fail("a second refresh at t = 0"))
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        model.outer.weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        before = Snapshot(optimizer)
        scaler.step(optimizer)
        scaler.update()
        before.assert_unchanged()
        optimizer.zero_grad()
    assert_same(curvature(optimizer), known)
    assert optimizer.param_groups[0]["accepted_refreshes"] == 1
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    assert optimizer.param_groups[0]["clock"] == 1
    assert not optimizer.curvature_due


# ---- the curvature's own loss scale


class Amplifier(nn.Module):
    """y = g · (w·x), whose sampled gradient with sign noise is ±√2 g x: a known size, whatever the noise."""

    def __init__(self, gain):
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False)
        self.gain = gain
        nn.init.constant_(self.layer.weight, 1e-5)

    def forward(self, x):
        return self.layer(x) * self.gain


@pytest.mark.parametrize(("gain", "least"), [(0.25, 0), (1.0, 1), (100.0, 2)])
def test_gradients_that_overflow_fp16_are_refused_until_the_scale_fits(gain, least):
    model = seeded(lambda: Amplifier(gain))
    estimator = GaussNewtonBartlett(likelihood="gaussian", noise="signs")
    optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0), estimator=estimator)
    x = torch.tensor([[6e4, -6e4, 3e4, 1e4]])
    refused = 0
    with torch.autocast("cpu", torch.float16):
        while not optimizer.refresh_curvature(lambda: model(x)):
            refused += 1
            assert optimizer.param_groups[0]["refused_refreshes"] == refused
            assert optimizer.param_groups[0]["curvature_scale"] < 1
            assert optimizer.curvature_due
            assert float(optimizer.stats()["refused_refreshes"]) == refused
            assert refused < 8
    assert refused >= least
    assert (refused > 0) == (least > 0)
    assert not optimizer.curvature_due
    torch.testing.assert_close(curvature(optimizer)[0], 2 * (gain * x) ** 2, rtol=4e-3, atol=0)


def test_scale_does_not_bias_the_estimate_after_a_run_of_outputs_that_were_not_finite():
    def estimate(refused, dtype):
        optimizer = SophiaG(model.parameters(), betas=(0.9, 0.0), estimator=GaussNewtonBartlett(noise="signs"))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            for _ in range(refused):
                assert not optimizer.refresh_curvature(lambda: model(tokens) * float("inf"))
            assert optimizer.refresh_curvature(lambda: model(tokens))
        return curvature(optimizer)

    # So many classes that their probabilities, scaled down too far, would be zero in fp16.
    model = seeded(lambda: nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 2048)))
    tokens = torch.arange(14).view(2, 7) % 7
    assert relative(estimate(10, torch.float16), estimate(0, torch.float32)) < 0.02


def test_scale_is_part_of_the_state_dict_and_grows_back():
    model = seeded(lambda: Amplifier(1.0))
    estimator = GaussNewtonBartlett(likelihood="gaussian")
    optimizer = SophiaG(model.parameters(), curvature_interval=1, estimator=estimator)
    large, small = torch.full((1, 4), 6e4), torch.ones(1, 4)
    with torch.autocast("cpu", torch.float16):
        assert not optimizer.refresh_curvature(lambda: model(large))
        other = SophiaG(seeded(lambda: Amplifier(1.0)).parameters(), curvature_interval=1, estimator=estimator)
        other.load_state_dict(optimizer.state_dict())
        assert other.refresh_curvature(lambda: model(large))
        model.layer.weight.grad = torch.ones(1, 4)
        for _ in range(8):
            assert optimizer.refresh_curvature(lambda: model(small))
            optimizer.step()
    assert optimizer.param_groups[0]["curvature_scale"] == 1.0


# ---- refused refreshes and steps


def test_after_refused_refreshes_momentum_builds_and_parameters_hold():
    model = seeded(lambda: nn.Linear(6, 5))
    optimizer = SophiaG(model.parameters(), lr=0.1, betas=(0.5, 0.9), weight_decay=0.3)
    x, _ = examples()
    values = [p.detach().clone() for p in model.parameters()]
    grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) for p in model.parameters()]
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad.clone()
    for step in range(1, 4):
        assert not optimizer.refresh_curvature(lambda: model(x) * float("nan"))
        optimizer.step()
        assert optimizer.param_groups[0]["clock"] == step
        assert optimizer.param_groups[0]["refused_refreshes"] == step
        assert optimizer.curvature_due
        assert_same(model.parameters(), values)  # bit for bit: no decay either
        for p, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], (1 - 0.5**step) * grad)
    assert optimizer.refresh_curvature(lambda: model(x))
    optimizer.step()
    assert not any(same(p, value) for p, value in zip(model.parameters(), values, strict=True))


class Syncs(TorchDispatchMode):
    """Operations whose result python waits for."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item", "unique")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(func.name().startswith(f"aten::{name}") for name in self.NAMES):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_step_inspects_no_value(value, foreach):
    model = seeded(lambda: nn.Linear(6, 5))
    optimizer = SophiaG(model.parameters(), foreach=foreach)
    for p in model.parameters():
        p.grad = torch.full_like(p, value)
    with Syncs() as syncs:  # while there is no curvature yet, and with it
        optimizer.refresh_curvature(lambda: model(examples()[0]) * float("nan"))
        assert syncs.found  # a refresh looks once whether its estimate is finite
        syncs.found.clear()
        optimizer.step()
        optimizer.refresh_curvature(lambda: model(examples()[0]))
        syncs.found.clear()
        optimizer.step()
        optimizer.stats()
    assert syncs.found == []
    assert optimizer.param_groups[0]["clock"] == 2


# ---- parameters in low precision


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", LOW)
def test_arithmetic_is_fp32_for_parameters_of_any_dtype(dtype, foreach):
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(64, 8, generator=generator).to(dtype))
    lr, (beta1, beta2), gamma, eps, decay = 0.01, (0.9, 0.99), 0.05, 1e-12, 0.1
    optimizer = Sophia([p], lr, (beta1, beta2), gamma, eps, decay, curvature_interval=2, foreach=foreach)
    m, h = (torch.zeros(64, 8, dtype=torch.float64) for _ in range(2))
    for step in range(12):
        if step % 2 == 0:
            estimate = 100 * torch.rand(64, 8, generator=generator).square()
            estimate[0] = 0
            optimizer.update_curvature([estimate])
            h = beta2 * h + (1 - beta2) * estimate.double()
        p.grad = torch.randn(64, 8, generator=generator).mul_(0.1).to(dtype)
        m = beta1 * m + (1 - beta1) * p.grad.double()
        theta = p.detach().double()  # each step starts from the same rounded parameter
        expected = theta * (1 - lr * decay) - lr * (m / (gamma * h).clamp_min(eps)).clamp(-1, 1)
        optimizer.step()
        state = optimizer.state[p]
        assert state["exp_avg"].dtype == state["hessian"].dtype == torch.float32
        torch.testing.assert_close(state["exp_avg"].double(), m, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(state["hessian"].double(), h, rtol=1e-5, atol=1e-9)
        # Half a unit in the last place, and a little for fp32: rounded once, at the end.
        unit = torch.finfo(dtype).eps * expected.abs()
        assert bool(((p.detach().double() - expected).abs() <= 0.51 * unit + 1e-7).all())


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", LOW)
def test_trap_9_least_denominator_is_not_zero_in_low_precision(dtype, foreach):
    p = nn.Parameter(torch.zeros(3, dtype=dtype))
    optimizer = Sophia([p], lr=0.5, weight_decay=0.0, foreach=foreach)
    optimizer.update_curvature([torch.zeros(3, dtype=dtype)])
    p.grad = torch.tensor([0.0, 6e-8, -6e-8], dtype=dtype)  # fp16's smallest numbers
    optimizer.step()
    assert p.tolist() == [0.0, -0.5, 0.5]
    fractions = optimizer.stats()
    assert float(fractions["clip_fraction"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", LOW)
def test_whole_models_in_low_precision_train(dtype):
    model = seeded(lambda: Classifier(dropout=0)).to(dtype)
    optimizer = SophiaG(model.parameters(), lr=2e-2, curvature_interval=2)
    x, y = examples()
    losses = []
    for _ in range(30):
        assert optimizer.refresh_curvature(lambda: model(x.to(dtype))) == (len(losses) % 2 == 0)
        loss = F.cross_entropy(model(x.to(dtype)).float(), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert {p.dtype for p in model.parameters()} == {dtype}
