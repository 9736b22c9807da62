"""Forwards, masks, rows and estimates: a wrong one is an error that names the value and the remedy; nothing changes."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaG, SophiaH
from sophia.curvature import GaussNewtonBartlett, Hutchinson
from tests.models import Classifier, Output, Snapshot, curvature, examples, in_the_middle, seeded

NAN, INF = float("nan"), float("inf")


# ---- forwards, masks and rows


def detached(model, x):
    with torch.no_grad():
        return model(x)


def mask(*shape, dtype=torch.bool):
    return torch.ones(shape, dtype=dtype)


FORWARDS = [
    # (what forward returns, message)
    (lambda m, x: m(x).sum(), r"returned a scalar, .*return model\(inputs\), not the loss"),
    (detached, r"logits of shape \(12, 5\) .* carry no gradient: .*no_grad"),
    (lambda m, x: m(x).detach(), "carry no gradient"),
    (lambda m, x: m(x).argmax(-1), r"returned torch\.int64 values, not logits"),
    (lambda m, x: None, "returned NoneType, not logits: return a tensor"),
    (lambda m, x: {"scores": m(x)}, r"returned dict of keys \['scores'\], not logits"),
    (lambda m, x: [m(x)], "returned list, not logits"),
    (lambda m, x: Output(None), "returned Output, not logits"),
    (lambda m, x: m(x)[:, :1], r"shape \(12, 1\) have one class.*bernoulli.*gaussian"),
    (lambda m, x: (m(x), m(x).sum()), r"a tuple of \(torch\.float32 \(12, 5\), .*\(logits, loss\), return its first"),
    (lambda m, x: (m(x), mask(12, dtype=torch.float32)), r"only \(logits, mask\) with a mask of dtype torch\.bool"),
    (lambda m, x: (m(x), mask(12, dtype=torch.int64)), r"torch\.int64 \(12,\)\): only \(logits, mask\)"),
    (lambda m, x: (m(x), mask(11)), r"mask has shape \(11,\), but for logits of shape \(12, 5\) it must be \(12,\)"),
    (lambda m, x: (m(x), mask(12, 5)), r"mask has shape \(12, 5\)"),
    (lambda m, x: (m(x), ~mask(12)), "no prediction counts on any rank: .*False everywhere; it must be True where"),
]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(("output", "message"), FORWARDS, ids=range(len(FORWARDS)))
def test_forward_for_sophia_g(output, message, chunks):
    model, optimizer = in_the_middle(estimator=GaussNewtonBartlett(chunks=chunks))
    model.norm.eval()
    x, _ = examples()
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.refresh_curvature(lambda: output(model, x))
    before.assert_unchanged()
    assert optimizer.curvature_due


@pytest.mark.parametrize("product", ["double_backward", "finite_difference"])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda m, x: m(x), r"shape \(12, 5\), but Hutchinson needs the scalar mean loss: return for example"),
        (lambda m, x: detached(m, x).sum(), "loss .* carries no gradient: compute it with the trainable model"),
        (lambda m, x: 1.0, "returned float without a loss"),
        (lambda m, x: Output(m(x)), "returned Output without a loss"),
    ],
)
def test_forward_for_sophia_h(output, message, product):
    model, optimizer = in_the_middle(SophiaH, estimator=Hutchinson(product=product))
    x, _ = examples()
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.refresh_curvature(lambda: output(model, x))
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: m(x), r"got a tensor of shape \(12, 5\): give a callable that computes it"),
        (lambda m, x: None, "needs a callable or an iterable of them, and got NoneType"),
        (lambda m, x: [], "an empty iterable: give at least one callable"),
        (lambda m, x: [lambda: m(x), m(x)], "item 1 of the iterable is a Tensor: each must be a callable"),
    ],
)
def test_argument_of_refresh_curvature(forward, message):
    model, optimizer = in_the_middle()
    argument = forward(model, examples()[0])
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.refresh_curvature(argument)
    before.assert_unchanged()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (range(11), "rows holds 11 indices, but the logits have 12 rows"),
        (range(13), "rows holds 13 indices, but the logits have 12 rows"),
        (torch.zeros(12), r"rows is torch\.float32 of shape \(12,\): it must be one whole number a batch row"),
        (torch.zeros(12, 1, dtype=torch.int64), r"rows is torch\.int64 of shape \(12, 1\)"),
        (torch.ones(12) > 0, r"rows is torch\.bool"),
        (["a"] * 12, "rows must be whole numbers"),
    ],
)
def test_rows(rows, message):
    model, optimizer = in_the_middle()
    x, _ = examples()
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.refresh_curvature([lambda: model(x[:4]), lambda: model(x[4:])], rows=rows)
    before.assert_unchanged()


def test_rows_and_padded_vocabulary_that_the_estimator_cannot_use():
    model, optimizer = in_the_middle(SophiaH)
    x, y = examples()
    with pytest.raises(ValueError, match=r"rows has no meaning for Hutchinson.*leave it out"):
        optimizer.refresh_curvature(lambda: F.cross_entropy(model(x), y), rows=range(12))
    optimizer = SophiaG(model.parameters(), estimator=GaussNewtonBartlett(vocab_size=6))
    with pytest.raises(ValueError, match="vocab_size=6 is more than the 5 classes"):
        optimizer.refresh_curvature(lambda: model(x))


def test_finite_differences_need_parameters_in_fp32():
    model = seeded(lambda: nn.Linear(6, 5)).to(torch.bfloat16)
    optimizer = SophiaH(model.parameters(), estimator=Hutchinson(product="finite_difference"))
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=r"one is torch\.bfloat16: keep the parameters in fp32 under autocast, or use"):
        optimizer.refresh_curvature(lambda: model(examples()[0].bfloat16()).float().square().mean())
    before.assert_unchanged()


# ---- estimates and steps


def ones():
    return [torch.ones_like(p) for p in seeded(Classifier).parameters()]


@pytest.mark.parametrize(
    ("estimates", "message"),
    [
        (ones()[:-1], "got 4 estimates for 5 parameters: give one tensor or None for each"),
        (ones()[0], "estimates is a Tensor: give a list"),
        (iter(ones()), "estimates is a list_iterator: give a list"),
        ([*ones()[:-1], 1.0], "estimate 4 is a float, not a tensor or None"),
        ([*ones()[:-1], torch.ones(4)], r"estimate 4 has shape \(4,\), its parameter \(5,\): they must match"),
        ([*ones()[:-1], torch.ones(5, dtype=torch.int64)], r"estimate 4 is torch\.int64: it must be floating point"),
    ],
)
def test_estimates(estimates, message):
    _, optimizer = in_the_middle()
    before = Snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.update_curvature(estimates)
    before.assert_unchanged()


@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_step_before_any_refresh(kind):
    model = seeded(Classifier)
    optimizer = kind(model.parameters())
    F.cross_entropy(model(examples()[0]), examples()[1]).backward()
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"add\n\s+optimizer\.refresh_curvature\(lambda: .*model\(inputs\)"):
        optimizer.step()
    before.assert_unchanged()


def test_sparse_gradients():
    model = seeded(lambda: nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 5)))
    optimizer = SophiaG(model.parameters())
    optimizer.update_curvature([torch.ones_like(p) for p in model.parameters()])
    model(torch.arange(3)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"shape \(7, 4\) has a sparse gradient.*sparse=False"):
        optimizer.step()
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
    assert optimizer.param_groups[0]["clock"] == 0


# ---- not finite: refused and counted, never an exception


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", [SophiaG, SophiaH])
def test_outputs_that_are_not_finite(kind, value):
    model, optimizer = in_the_middle(kind)
    x, y = examples()
    x[3, 2] = value

    def forward():
        return model(x) if kind is SophiaG else F.cross_entropy(model(x), y)

    known = [h.clone() for h in curvature(optimizer)]
    for attempt in (1, 2):
        assert optimizer.refresh_curvature(forward) is False
        assert optimizer.param_groups[0]["refused_refreshes"] == attempt
        assert optimizer.curvature_due
    assert all(torch.equal(h, before) for h, before in zip(curvature(optimizer), known, strict=True))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_estimates_that_are_not_finite(value):
    _, optimizer = in_the_middle()
    before = Snapshot(optimizer)
    estimates = ones()
    estimates[2][7] = value
    assert optimizer.update_curvature(estimates) is False
    assert optimizer.param_groups[0]["refused_refreshes"] == 1
    assert optimizer.curvature_due
    for group, old in zip(optimizer.param_groups, before.groups, strict=True):
        old.update(refused_refreshes=1, curvature_scale=group["curvature_scale"])
    before.assert_unchanged()
    assert math.isfinite(float(optimizer.stats()["curvature_norm"]))
    assert optimizer.update_curvature(ones())
