"""The chunked loss against the plain one, `F.cross_entropy` of all logits."""

import functools
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import sophia.loss
from sophia.loss import CrossEntropy, chunk_rows, summed_cross_entropy
from sophia.model import GPT, GPTConfig

VOCAB, ROWS, WIDTH = 37, 48, 12
CHUNK = chunk_rows(ROWS, "cpu")


def example(predictions, dtype=torch.float64, ignored=True, scale=1.0):
    """Hidden states, weight and targets; every fifth target does not count."""
    draw = torch.Generator().manual_seed(predictions)
    hidden = torch.randn(predictions, WIDTH, generator=draw, dtype=torch.float64) * scale
    weight = torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (predictions,), generator=draw)
    if ignored:
        targets[::5] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain_loss(hidden, weight, targets, vocab_size):
    return F.cross_entropy(F.linear(hidden, weight)[:, :vocab_size], targets, reduction="sum")


def loss_and_gradients(loss, hidden, weight, targets, factor=0.25, low=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        total = loss(hidden, weight, targets, VOCAB)
    return total.detach(), *torch.autograd.grad(total * factor, [hidden, weight])


@pytest.fixture(params=["eager", "fusible"])
def chunked(request, monkeypatch):
    """The chunked loss as it is for models that run eagerly, and in the form that is compiled, uncompiled."""
    if request.param == "eager":
        return summed_cross_entropy
    monkeypatch.setattr(sophia.loss, "_compiled_act", lambda: sophia.loss._fusible_loss_and_gradient_)
    return functools.partial(summed_cross_entropy, compiled=True)


@pytest.mark.parametrize("predictions", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("ignored", [False, True])
def test_exactly_the_plain_loss(chunked, predictions, ignored):
    case = example(predictions, ignored=ignored)
    found, expected = (loss_and_gradients(loss, *case) for loss in (chunked, plain_loss))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * theirs.abs().max().item())
    assert not found[2][VOCAB:].any()  # padding


@pytest.mark.parametrize("kind", ["fp32", "autocast", "bf16 parameters"])
def test_low_precision_is_not_worse_than_the_plain_loss(chunked, kind):
    """Three corners: float64, the plain loss in this precision, ours."""
    predictions = 3 * CHUNK
    dtype = torch.bfloat16 if kind == "bf16 parameters" else torch.float32
    low = example(predictions, dtype)
    exact = loss_and_gradients(plain_loss, *(t.detach().double().requires_grad_() for t in low[:2]), low[2])
    ours, theirs = (loss_and_gradients(loss, *low, low=kind != "fp32") for loss in (chunked, plain_loss))
    assert ours[0].dtype == torch.float32
    # With parameters in bf16 the sum of the chunks' products, which are in bf16, is rounded again.
    limit = 1.2 if kind == "bf16 parameters" else 1.0
    for our, their, true in zip(ours, theirs, exact, strict=True):
        error, allowed = (torch.linalg.norm(found.double() - true) for found in (our, their))
        assert error <= limit * allowed + 3e-7 * torch.linalg.norm(true)


def test_gradients_have_the_dtype_of_what_they_belong_to():
    for dtype, low in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float64, True)):
        hidden, weight, targets = example(9, dtype)
        total, *gradients = loss_and_gradients(summed_cross_entropy, hidden, weight, targets, low=low)
        assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
        assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_autocast_leaves_float64_alone():
    case = example(20)
    torch.testing.assert_close(
        loss_and_gradients(summed_cross_entropy, *case, low=True),
        loss_and_gradients(plain_loss, *case),
        rtol=1e-12,
        atol=0,
    )


def test_logits_of_any_size(chunked):
    case = example(50, scale=1e4)
    found, expected = (loss_and_gradients(loss, *case) for loss in (chunked, plain_loss))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found[0].isfinite()


def test_no_target_counts():
    hidden, weight, targets = example(9)
    total, *gradients = loss_and_gradients(summed_cross_entropy, hidden, weight, torch.full_like(targets, -100))
    assert total == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, targets = example(CHUNK + 5)
    expected = dict(
        zip(("hidden", "weight"), loss_and_gradients(plain_loss, hidden, weight, targets, 1)[1:], strict=True)
    )
    both = {"hidden": hidden, "weight": weight}
    both.pop(frozen).requires_grad_(False)
    summed_cross_entropy(hidden, weight, targets, VOCAB).backward()
    for name, tensor in both.items():
        torch.testing.assert_close(tensor.grad, expected[name], rtol=1e-12, atol=1e-12)
    assert {"hidden": hidden, "weight": weight}[frozen].grad is None


def test_without_gradients_it_computes_none():
    hidden, weight, targets = example(CHUNK + 5)
    with torch.no_grad():
        found = summed_cross_entropy(hidden, weight, targets, VOCAB)
    assert not found.requires_grad
    torch.testing.assert_close(found, plain_loss(hidden, weight, targets, VOCAB).detach(), rtol=1e-12, atol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile itself
def test_compiled():
    """By the real compiler, which makes C++ of it here."""
    hidden, weight, targets = example(CHUNK + 3, torch.float32)
    compiled = functools.partial(summed_cross_entropy, compiled=True)
    found, expected = (loss_and_gradients(loss, hidden, weight, targets) for loss in (compiled, summed_cross_entropy))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_it_is_differentiated_once():
    hidden, weight, targets = example(5)
    total = summed_cross_entropy(hidden, weight, targets, VOCAB)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    (gradient,) = torch.autograd.grad(summed_cross_entropy(hidden, weight, targets, VOCAB), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def largest_and_peak(run):
    """Bytes of the largest tensor, and of all at the worst moment."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = record.profiler.kineto_results.events()
    sizes = [e.nbytes() for e in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())]
    alive = peak = 0
    for size in sizes:
        alive += size
        peak = max(peak, alive)
    return max(sizes), peak


def test_the_logits_never_exist():
    """4096 predictions of 3000 ids: the plain loss has three tensors of that size at once, ours an eighth of one."""
    hidden, weight, targets = torch.randn(4096, 8), torch.randn(3000, 8), torch.zeros(4096, dtype=torch.long)
    weight.requires_grad_()
    logits = 4096 * 3000 * 4
    largest, peak = largest_and_peak(lambda: summed_cross_entropy(hidden, weight, targets, 3000).backward())
    assert largest == logits // 8
    assert peak < logits // 7
    assert largest_and_peak(lambda: plain_loss(hidden, weight, targets, 3000).backward())[1] >= 3 * logits


def test_as_a_readout_of_the_model():
    model = GPT(GPTConfig(vocab_size=50, context=16, layers=2, heads=2, width=8, padded_vocab_size=64)).double()
    ids = torch.randint(0, 50, (3, 17))
    logits = model(ids[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 3)):  # gradients accumulate
        model(ids[part, :-1], CrossEntropy(ids[part, 1:])).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_gpus_take_larger_chunks():
    assert chunk_rows(50304, "cuda") == 2048
    assert chunk_rows(1 << 27, "cuda") == chunk_rows(50304, "cpu") == 512
