"""Bias-corrected curvature: h_n / (1 − β2ⁿ) of the plain recursion, for the n estimates that reached a parameter."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from sophia import Sophia, SophiaG, SophiaH
from tests.reference import reference_sophia
from tests.regression import parameters_equal, regression, train
from tests.test_rule import DEVICES, PATHS, TOLERANCE, compare, contiguous, draw, strided, transposed

BETAS = (0.9, 0.8)  # so quick an average that a wrong weight shows at once


def plain(estimates, beta2):
    """h_n / (1 − β2ⁿ), by the paper's recursion in float64; None is an estimate that did not reach it."""
    h, n = torch.zeros_like(next(e for e in estimates if e is not None)).double(), 0
    for estimate in estimates:
        if estimate is not None:
            h, n = beta2 * h + (1 - beta2) * estimate.double(), n + 1
    return h / (1 - beta2**n)


def drawn(count, shape=(5, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).square() for _ in range(count)]


def parameter(shape=(5, 3), **settings):
    p = nn.Parameter(torch.zeros(shape))
    return p, Sophia([p], betas=BETAS, bias_correction=True, **settings)


@pytest.mark.parametrize("layout", [contiguous, transposed, strided], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_path_agrees_with_the_reference(device, path, dtype, layout):
    """The step's, too: with h_n / (1 − β2ⁿ) in place of h."""
    theta, grads, estimates = draw((8, 9), dtype, seed=1)
    p = nn.Parameter(layout(theta.clone()).to(device))
    optimizer = Sophia([p], lr=0.05, betas=BETAS, bias_correction=True, **PATHS[path])
    whole, m, known = theta.double(), torch.zeros_like(theta).double(), []
    for grad, estimate in zip(grads, estimates, strict=True):
        if estimate is not None:
            known.append(estimate)
            assert optimizer.update_curvature([estimate.to(device)])
        p.grad = grad.clone().to(device)
        optimizer.step()
        m = BETAS[0] * m + (1 - BETAS[0]) * grad.double()
        h = plain(known, BETAS[1])
        whole = whole * (1 - 0.05 * 0.2) - 0.05 * torch.clamp(m / torch.clamp(0.05 * h, min=1e-12), -1, 1)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    compare(optimizer.state[p]["hessian"], plain(known, BETAS[1]), precise)
    compare(p.detach(), whole, dtype)


@pytest.mark.parametrize("path", PATHS)
def test_the_first_estimate_is_taken_as_it_is(path):
    (first,) = drawn(1)
    p, optimizer = parameter(**PATHS[path])
    optimizer.update_curvature([first])
    assert torch.equal(optimizer.state[p]["hessian"], first)


@pytest.mark.parametrize("path", PATHS)
def test_many_estimates(path):
    """Over a thousand, the weights come down to 1 − β2; a constant stays what it is."""
    p, optimizer = parameter(**PATHS[path])
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    estimates = drawn(1000)
    for estimate in estimates:
        optimizer.update_curvature([estimate])
    torch.testing.assert_close(optimizer.state[p]["hessian"].double(), plain(estimates, 0.99), rtol=1e-5, atol=1e-6)
    assert optimizer.state[p]["refreshes"] == optimizer.refreshes == 1000


@pytest.mark.parametrize("path", PATHS)
def test_without_memory_it_is_the_uncorrected_rule(path):
    theta, grads, estimates = draw((6, 4), torch.float32, seed=2)
    results = []
    for corrected in (True, False):
        p = nn.Parameter(theta.clone())
        optimizer = Sophia([p], lr=0.05, betas=(0.9, 0.0), bias_correction=corrected, **PATHS[path])
        for grad, estimate in zip(grads, estimates, strict=True):
            if estimate is not None:
                optimizer.update_curvature([estimate])
            p.grad = grad.clone()
            optimizer.step()
        results.append((p.detach(), optimizer.state[p]["hessian"]))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_without_it_nothing_is_different():
    theta, grads, estimates = draw((6, 4), torch.float64, seed=3)
    p = nn.Parameter(theta.clone())
    optimizer = Sophia([p], lr=0.05, bias_correction=False)
    for grad, estimate in zip(grads, estimates, strict=True):
        if estimate is not None:
            optimizer.update_curvature([estimate])
        p.grad = grad.clone()
        optimizer.step()
    compare(p.detach(), reference_sophia(theta, grads, estimates, lr=0.05)[0], torch.float64)
    assert optimizer.state[p].keys() == {"step", "exp_avg", "hessian"}


def test_a_parameter_counts_the_estimates_that_reached_it():
    """One that an estimate leaves out, and one that came later, have averages of their own length."""
    first, second, third = (nn.Parameter(torch.zeros(5, 3)) for _ in range(3))
    optimizer = Sophia([first, second], betas=BETAS, bias_correction=True)
    estimates = drawn(12)
    rows = [[estimates[t], None if t in (0, 2) else estimates[6 + t]] for t in range(3)]
    for row in rows:
        optimizer.update_curvature(row)
    optimizer.add_param_group({"params": [third]})
    rows = [[*row, None] for row in rows] + [[estimates[3], estimates[9], estimates[10]]]
    optimizer.update_curvature(rows[-1])
    for p, column, count in zip((first, second, third), zip(*rows, strict=True), (4, 2, 1), strict=True):
        torch.testing.assert_close(optimizer.state[p]["hessian"].double(), plain(column, BETAS[1]), rtol=1e-6, atol=0)
        assert optimizer.state[p]["refreshes"] == count
    assert optimizer.refreshes == 4


def test_a_refused_refresh_does_not_count():
    p, optimizer = parameter()
    one, other = drawn(2)
    optimizer.update_curvature([one])
    assert not optimizer.update_curvature([torch.full((5, 3), torch.nan)])
    optimizer.update_curvature([other])
    torch.testing.assert_close(optimizer.state[p]["hessian"].double(), plain([one, other], BETAS[1]), rtol=1e-6, atol=0)
    assert (optimizer.state[p]["refreshes"], optimizer.refreshes) == (2, 2)


def test_groups_may_differ():
    first, second = nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.zeros(5, 3))
    groups = [{"params": [first]}, {"params": [second], "bias_correction": False}]
    optimizer = Sophia(groups, betas=BETAS, bias_correction=True)
    (estimate,) = drawn(1)
    optimizer.update_curvature([estimate, estimate])
    assert torch.equal(optimizer.state[first]["hessian"], estimate)
    torch.testing.assert_close(optimizer.state[second]["hessian"], 0.2 * estimate)


def test_state_in_bf16_is_the_same_average():
    """Stochastic rounding: the mean over many elements is the exact one."""
    p, optimizer = parameter((20_000,), state_dtype=torch.bfloat16)
    estimates = [torch.full((20_000,), value) for value in (1.0, 3.01, 0.7, 5.3, 2.2)]
    for estimate in estimates:
        optimizer.update_curvature([estimate])
        p.grad = torch.zeros(20_000)
        optimizer.step()  # the noise is a function of t
    found, expected = optimizer.state[p]["hessian"], plain(estimates, BETAS[1])[0].item()
    assert found.dtype == torch.bfloat16
    assert found.double().mean().item() == pytest.approx(expected, rel=2e-4)
    assert found.double().std().item() < 2**-8 * expected * 2


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resume_goes_on_with_the_count(kind, dtype):
    """Also onto parameters in bf16, to which torch would round it."""

    def closure(model, optimizer, inputs, labels, steps):
        for _ in range(steps):
            logits = lambda: model(inputs)  # noqa: E731
            loss = lambda: nn.functional.cross_entropy(model(inputs).float(), labels)  # noqa: E731
            optimizer.refresh_curvature(logits if kind is SophiaG else loss)
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    model, inputs, labels = regression(dtype)
    settings = {"lr": 1e-2, "curvature_interval": 2, "bias_correction": True}
    optimizer = kind(model.parameters(), **settings)
    closure(model, optimizer, inputs, labels, 5)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    again, _, _ = regression(dtype, seed=5)
    again.load_state_dict(saved["model"])
    resumed = kind(again.parameters())  # the setting is in the state dict
    resumed.load_state_dict(saved["optimizer"])
    closure(model, optimizer, inputs, labels, 6)
    closure(again, resumed, inputs, labels, 6)
    assert parameters_equal(model, again)
    for p in again.parameters():
        count = resumed.state[p]["refreshes"]
        assert (count, count.dtype, count.device.type) == (6, torch.float32, "cpu")


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on_with_the_count(twin_of):
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters(), lr=1e-2, curvature_interval=2, bias_correction=True)
    train(model, optimizer, inputs, labels, 4)
    twin, other = twin_of((model, optimizer))
    train(model, optimizer, inputs, labels, 5)
    train(twin, other, inputs, labels, 5)
    assert parameters_equal(model, twin)


def test_a_state_dict_from_before_it_existed_starts_its_average_anew():
    """Its h is too small by a factor that nobody knows; the next estimate replaces it, and counts as the first."""
    model, inputs, labels = regression()
    optimizer = SophiaG(model.parameters(), lr=1e-2, curvature_interval=2)
    train(model, optimizer, inputs, labels, 3)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        del group["bias_correction"], group["clip_target"]
    for bias_correction in (False, True):
        p = next(model.parameters())
        other = SophiaG(model.parameters(), curvature_interval=2, bias_correction=bias_correction)
        other.load_state_dict(old)
        assert other.param_groups[0]["bias_correction"] is bias_correction
        before = other.state[p]["hessian"].clone()
        assert torch.equal(before, optimizer.state[p]["hessian"])
        ones = [torch.ones_like(q) for q in model.parameters()]
        other.update_curvature(ones)
        torch.testing.assert_close(other.state[p]["hessian"], ones[0] if bias_correction else 0.99 * before + 0.01)


def test_a_pickle_from_before_it_existed_is_uncorrected():
    _, optimizer = parameter()
    content = optimizer.__getstate__()
    later = ("bias_correction", "clip_target")
    content["defaults"] = {k: v for k, v in content["defaults"].items() if k not in later}
    content["param_groups"] = [{k: v for k, v in g.items() if k not in later} for g in content["param_groups"]]
    other = Sophia.__new__(Sophia)
    other.__setstate__(content)
    assert (other.param_groups[0]["bias_correction"], other.param_groups[0]["clip_target"]) == (False, None)
    other.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert other.param_groups[1]["bias_correction"] is False


@pytest.mark.parametrize("wrong", [1, None, "yes"])
def test_what_is_no_truth_value_is_refused(wrong):
    with pytest.raises(ValueError, match=r"bias_correction=.* must be True or False"):
        Sophia([nn.Parameter(torch.zeros(2))], bias_correction=wrong)
