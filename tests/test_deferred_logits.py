"""`deferred_logits`: the estimate of plain logits, without the logits."""

import functools
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sophia import SophiaG
from sophia.curvature import GaussNewtonBartlett, deferred_logits
from sophia.model import GPT, GPTConfig
from sophia.optim.curvature.deferred import deferred_head
from sophia.optim.replicas import Replicas
from tests import exact

CLOSE = {"rtol": 1e-12, "atol": 1e-15}  # float64
ROWS, TIME, WIDTH, VOCAB = 6, 5, 4, 70


class Model(nn.Module):
    """What a user's own model may look like; its head has padding."""

    def __init__(self, vocab=VOCAB, padding=3, bias=False):
        super().__init__()
        self.embed = nn.Embedding(vocab, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, vocab + padding, bias=bias)

    def forward(self, tokens, readout=None, vocab_size=None):
        hidden = self.body(self.embed(tokens))
        if readout is not None:
            return readout(hidden, self.head.weight, vocab_size)
        return self.head(hidden)


def build(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(**settings).double()
        return model, torch.randint(0, VOCAB, (ROWS, TIME))


def estimate(estimator, forwards, model, **settings):
    forwards = forwards if isinstance(forwards, list) else [forwards]
    return estimator.estimate(forwards, list(model.parameters()), exact.refresh(step=3, **settings))


def assert_same(found, expected, **tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or CLOSE))


def a_mask(kind):
    mask = torch.ones(ROWS, TIME, dtype=torch.bool)
    if kind == "some":
        mask[0] = mask[2, 1:] = mask[5, ::2] = False
    return None if kind == "none given" else mask


@pytest.mark.parametrize(
    "blocks", [1 << 20, 2 * VOCAB, TIME * (VOCAB + 3) * 2], ids=["one", "part of a row", "two rows"]
)
@pytest.mark.parametrize("mask", ["none given", "all", "some"])
@pytest.mark.parametrize("noise", ["labels", "signs"])
def test_the_estimate_is_that_of_plain_logits(monkeypatch, noise, mask, blocks):
    monkeypatch.setattr("sophia.optim.curvature.deferred._BLOCK", blocks)
    model, tokens = build()
    mask = a_mask(mask)
    for estimator in (GaussNewtonBartlett(noise=noise, vocab_size=VOCAB), GaussNewtonBartlett(noise=noise, chunks=4)):

        def forward(readout=None):
            logits = model(tokens, readout)
            return logits if mask is None else (logits, mask)

        for settings in ({}, {"rows": torch.tensor([9, 3, 70, 1, 0, 2])}, {"scale": 2.0**-6}):
            plain = estimate(estimator, forward, model, **settings)
            deferred = estimate(estimator, functools.partial(forward, deferred_logits), model, **settings)
            assert_same(deferred, plain)


@pytest.mark.parametrize("blocks", [1 << 18, 3 * VOCAB])
def test_labels_are_the_same_ones(monkeypatch, blocks):
    """Where each gradient is that of one sampled label, other labels could not go unnoticed."""
    monkeypatch.setattr("sophia.optim.curvature.deferred._BLOCK", blocks)
    model, tokens = build()
    params = list(model.parameters())

    def gradient(forward):
        ((gradients, count),) = GaussNewtonBartlett().chunk_gradients([forward], params, exact.refresh())
        assert count == ROWS * TIME
        return gradients[-1]  # of the head: Σ (p − onehot(ŷ)) xᵀ

    torch.testing.assert_close(
        gradient(lambda: model(tokens, deferred_logits)), gradient(lambda: model(tokens)), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("where", ["estimator", "readout", "both"])
@pytest.mark.parametrize("noise", ["labels", "signs"])
def test_trap_6_padding_of_the_vocabulary(noise, where):
    model, tokens = build(padding=9)
    estimator = GaussNewtonBartlett(noise=noise, vocab_size=None if where == "readout" else VOCAB)
    told = None if where == "estimator" else VOCAB
    found = estimate(estimator, lambda: model(tokens, deferred_logits, told), model)
    assert (found[-1][:VOCAB] > 0).all()
    assert (found[-1][VOCAB:] == 0).all()
    expected = estimate(GaussNewtonBartlett(noise=noise, vocab_size=VOCAB), lambda: model(tokens), model)
    assert_same(found, expected)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 2)])
def test_hidden_states_of_any_shape(shape):
    weight = nn.Parameter(torch.randn(7, 3, dtype=torch.float64))
    hidden = torch.randn(*shape, 3, dtype=torch.float64, requires_grad=True)
    params = [weight, hidden]
    refresh = exact.refresh()
    plain = GaussNewtonBartlett().estimate([lambda: hidden @ weight.T], params, refresh)
    assert_same(GaussNewtonBartlett().estimate([lambda: deferred_logits(hidden, weight)], params, refresh), plain)


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}, {"dropout": 0.3}])
@pytest.mark.parametrize("noise", ["labels", "signs"])
def test_our_model(noise, settings):
    """Tied head, padded; checkpoints compute their blocks again in the same backward pass."""
    config = GPTConfig(vocab_size=11, padded_vocab_size=16, context=6, layers=2, heads=2, width=8, **settings)
    model = GPT(config, torch.Generator().manual_seed(0)).double()
    tokens = torch.randint(0, 11, (4, 6))
    estimator = GaussNewtonBartlett(noise=noise, chunks=2)
    plain = estimate(estimator, lambda: model(tokens), model)
    deferred = estimate(estimator, lambda: model(tokens, deferred_logits), model)
    assert_same(deferred, plain)
    embedding = dict(zip([name for name, _ in model.named_parameters()], deferred, strict=True))["tokens.weight"]
    assert (embedding[:11] > 0).all()
    assert (embedding[11:] == 0).all()


def test_under_autocast_products_are_in_its_dtype():
    """As plain logits there: bf16 products. The backward pass runs outside the region."""
    model, tokens = build(padding=0)
    model = model.float()

    def run(readout, noise):
        with torch.autocast("cpu", torch.bfloat16):
            return estimate(GaussNewtonBartlett(noise=noise), lambda: model(tokens, readout), model)

    for noise in ("labels", "signs"):
        plain, deferred = run(None, noise), run(deferred_logits, noise)
        assert all(e.dtype == torch.float32 for e in deferred)
        assert_same(deferred, plain, rtol=0.05, atol=1e-4)
        exactly = estimate(GaussNewtonBartlett(noise=noise), lambda: model(tokens, deferred_logits), model)
        assert not any(torch.equal(one, other) for one, other in zip(deferred, exactly, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert deferred_head(model(tokens, deferred_logits)).dtype == torch.bfloat16
        assert deferred_head(model.double()(tokens, deferred_logits)).dtype == torch.float64


def test_parameters_in_low_precision():
    model, tokens = build()
    model = model.to(torch.bfloat16)
    plain = estimate(GaussNewtonBartlett(), lambda: model(tokens), model)
    assert_same(
        estimate(GaussNewtonBartlett(), lambda: model(tokens, deferred_logits), model), plain, rtol=0.1, atol=0.02
    )


def test_a_compiled_model():
    model, tokens = build()
    expected = estimate(GaussNewtonBartlett(), lambda: model(tokens), model)
    compiled = torch.compile(model, backend="aot_eager")
    found = estimate(GaussNewtonBartlett(), lambda: compiled(tokens, deferred_logits), model)
    assert_same(found, expected)


def test_a_factor_behind_the_readout_is_owed():
    model, tokens = build()
    plain = estimate(GaussNewtonBartlett(), lambda: 3 * model(tokens, deferred_logits), model)
    assert_same(plain, [9 * e for e in estimate(GaussNewtonBartlett(), lambda: model(tokens, deferred_logits), model)])


def test_frozen_parts():
    model, tokens = build()
    for frozen in (model.head.weight, model.body[0].weight):
        frozen.requires_grad_(False)
        plain = estimate(GaussNewtonBartlett(), lambda: model(tokens), model)
        deferred = estimate(GaussNewtonBartlett(), lambda: model(tokens, deferred_logits), model)
        assert (
            [e is None for e in deferred]
            == [e is None for e in plain]
            == [not p.requires_grad for p in model.parameters()]
        )
        assert_same([e for e in deferred if e is not None], [e for e in plain if e is not None])


def test_refresh_curvature_takes_it():
    model, tokens = build()
    hessians = []
    for readout in (None, deferred_logits):
        optimizer = SophiaG(model.parameters())
        assert optimizer.refresh_curvature([functools.partial(model, part, readout) for part in tokens.split(2)])
        hessians.append([optimizer.state[p]["hessian"] for p in model.parameters()])
    assert_same(*hessians)


class Watch(TorchDispatchMode):
    """The largest tensor that is made inside, and how often the host asks for a value."""

    def __init__(self):
        super().__init__()
        self.largest = self.asked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("noise", ["labels", "signs"])
def test_whole_logits_never_exist(monkeypatch, noise):
    monkeypatch.setattr("sophia.optim.curvature.deferred._BLOCK", 4 * VOCAB)
    model, tokens = build(padding=0)
    estimator = GaussNewtonBartlett(noise=noise)
    with Watch() as plain:
        estimate(estimator, lambda: model(tokens), model)
    with Watch() as deferred:
        estimate(estimator, lambda: model(tokens, deferred_logits), model)
    assert plain.largest >= ROWS * TIME * VOCAB
    # For four positions logits, or whole words of signs, or the inverse CDF's fine table.
    assert deferred.largest <= 4 * 256


@pytest.mark.parametrize("kind", ["none given", "some", "all"])
def test_the_host_waits_for_the_device_once_a_refresh(kind):
    """For the verdict. Masks on the host are counted there; asking for a value of theirs is no waiting."""
    model, tokens = build()
    optimizer, mask = SophiaG(model.parameters()), a_mask(kind)

    def forward(part):
        logits = model(tokens[part], deferred_logits)
        return logits if mask is None else (logits, mask[part])

    forwards = [functools.partial(forward, part) for part in (slice(0, 2), slice(2, 4), slice(4, 6))]
    with Watch() as watch:
        assert optimizer.refresh_curvature(forwards)
    assert watch.asked == 1 + (0 if mask is None else len(forwards))


def test_one_set_of_chunk_gradients_at_a_time(monkeypatch):
    """When a chunk's forward begins, no gradient of an earlier chunk is left but the first one's, now the squares."""
    model, tokens = build()
    original, chunks, alive = Replicas.sum_gradients, [], []

    def recorded(self, grads, params):
        totals = original(self, grads, params)
        chunks.append([weakref.ref(total) for total in totals])
        return totals

    def forward(part):
        alive.append([sum(ref() is not None for ref in refs) for refs in chunks])
        return model(part, deferred_logits)

    monkeypatch.setattr(Replicas, "sum_gradients", recorded)
    monkeypatch.setattr(Replicas, "alone", False)  # as under an engine
    estimate(GaussNewtonBartlett(), [functools.partial(forward, part) for part in tokens.split(1)], model)
    count = len(list(model.parameters()))
    assert alive == [[count, *[0] * (number - 1)][:number] for number in range(ROWS)]


def test_it_is_no_loss():
    model, tokens = build()
    with pytest.raises(RuntimeError, match="deferred_logits is no loss"):
        model(tokens, deferred_logits).backward()


@pytest.mark.parametrize(
    ("hidden", "weight", "vocab_size", "message"),
    [
        ((2, 3), (7, 4), None, r"shape \(2, 3\) and a weight of shape \(7, 4\)"),
        ((2, 3), (7,), None, r"they must be \[..., width\] and \[vocabulary, width\]"),
        ((2, 3), (7, 3), 8, "vocab_size 8 for a weight of 7 rows"),
        ((2, 3), (7, 3), 1, "vocab_size 1 for a weight of 7 rows"),
    ],
)
def test_shapes_that_do_not_fit(hidden, weight, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        deferred_logits(torch.zeros(hidden), torch.zeros(weight), vocab_size)


@pytest.mark.parametrize(
    ("settings", "forward", "message"),
    [
        ({"vocab_size": 74}, lambda m, x: m(x, deferred_logits), "vocab_size=74 is more than the 73 classes"),
        ({"likelihood": "bernoulli"}, lambda m, x: m(x, deferred_logits), "for the categorical likelihood"),
        ({}, lambda m, x: (m(x, deferred_logits), torch.ones(ROWS, dtype=torch.bool)), r"must be \(6, 5\)"),
        ({}, lambda m, x: m(x, deferred_logits).detach(), "forward\\(\\) returned a scalar"),
        ({}, lambda m, x: m(x).sum(), "forward\\(\\) returned a scalar"),
    ],
)
def test_what_the_estimator_refuses(settings, forward, message):
    model, tokens = build()
    with pytest.raises(ValueError, match=message):
        estimate(GaussNewtonBartlett(**settings), lambda: forward(model, tokens), model)
