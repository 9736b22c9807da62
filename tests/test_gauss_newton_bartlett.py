"""Gauss-Newton-Bartlett against the exact Gauss-Newton diagonal."""

import functools
import inspect

import pytest
import torch
from torch.nn import functional as F

from sophia import SophiaG
from sophia.curvature import GaussNewtonBartlett
from sophia.optim.curvature.likelihood import sample_categorical
from tests import exact

SAMPLES = 1200


@functools.cache
def categorical():
    model, tokens, targets = exact.build()
    return model, tokens, targets, exact.exact_gauss_newton(model, tokens, exact.categorical_hessian)


@functools.cache
def drawn_whole(noise):
    model, tokens, _, _ = categorical()
    return exact.samples(GaussNewtonBartlett(noise=noise), [lambda: model(tokens)], model, SAMPLES)


@pytest.mark.parametrize("noise", ["labels", "signs"])
def test_unbiased_for_the_gauss_newton_diagonal(noise):
    model, _, _, truth = categorical()
    exact.assert_unbiased(drawn_whole(noise), truth, model)
    assert (drawn_whole(noise) >= 0).all()


@pytest.mark.parametrize("factor", [1.1, 1 / 1.1])
def test_the_bound_would_break_on_a_wrong_factor(factor):
    model, _, _, truth = categorical()
    with pytest.raises(AssertionError):
        exact.assert_unbiased(drawn_whole("labels") * factor, truth, model)


def test_trap_3_training_labels_would_break_the_bound():
    """The empirical Fisher, from the gradients of the training labels, is another matrix."""
    model, tokens, targets, truth = categorical()
    F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum").backward()
    fisher = exact.flat([p.grad.square() for p in model.parameters()]) / targets.numel()
    model.zero_grad()
    noisy = drawn_whole("labels") - truth + fisher
    with pytest.raises(AssertionError):
        exact.assert_unbiased(noisy, truth, model)


@pytest.mark.parametrize("chunks", [2, 4, 8])
def test_chunks_divide_the_variance(chunks):
    model, tokens, _, truth = categorical()
    whole = exact.relative_squared_error(drawn_whole("labels"), truth)
    drawn = exact.samples(GaussNewtonBartlett(chunks=chunks), [lambda: model(tokens)], model, 700)
    exact.assert_unbiased(drawn, truth, model)
    # A sum over many predictions is nearly normal, its square has a relative variance of 2: so 2 / chunks, plus what
    # the rare tokens of so small a batch add whatever the cut.
    error = exact.relative_squared_error(drawn, truth)
    assert 1.8 < whole < 2.8
    assert 1.8 / chunks < error < 2 / chunks + 0.7
    assert error < whole


def test_trap_5_every_micro_batch_counts():
    """Slices as forwards are chunks: all of them are in the estimate, and N is the count of them all."""
    model, tokens, _, truth = categorical()
    slices = [functools.partial(model, part) for part in tokens.split(2)]
    drawn = exact.samples(GaussNewtonBartlett(), slices, model, 700)
    exact.assert_unbiased(drawn, truth, model)
    assert exact.relative_squared_error(drawn, truth) < 2 / 4 + 0.7


@pytest.mark.parametrize("rows", [3, 8])
def test_trap_2_the_batch_factor_belongs_to_the_estimate(rows):
    """The expectation is the curvature of the mean loss for any batch size, and step() asks for none."""
    model, tokens, _, _ = categorical()
    part = tokens[:rows]
    truth = exact.exact_gauss_newton(model, part, exact.categorical_hessian)
    drawn = exact.samples(GaussNewtonBartlett(), [lambda: model(part)], model, 2 * SAMPLES)
    exact.assert_unbiased(drawn, truth, model)
    assert list(inspect.signature(SophiaG.step).parameters) == ["self", "closure"]


def test_random_signs_have_less_variance_than_labels():
    model, tokens, _, truth = categorical()
    singles = [functools.partial(model, part) for part in tokens.split(1)]
    labels = exact.samples(GaussNewtonBartlett(), singles, model, 700)
    signs = exact.samples(GaussNewtonBartlett(noise="signs"), singles, model, 700)
    assert exact.relative_squared_error(signs, truth) < 0.95 * exact.relative_squared_error(labels, truth)


@pytest.mark.parametrize("noise", ["labels", "signs"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_trap_6_masked_positions_do_not_count(noise, chunks):
    model, tokens, _, _ = categorical()
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[0, :1] = True
    mask[3, :4] = True
    mask[5:] = True
    truth = exact.exact_gauss_newton(model, tokens, exact.categorical_hessian, mask)
    drawn = exact.samples(
        GaussNewtonBartlett(noise=noise, chunks=chunks), [lambda: (model(tokens), mask)], model, SAMPLES
    )
    exact.assert_unbiased(drawn, truth, model)


def test_trap_12_chunks_with_unequal_counts_are_weighted():
    """One forward counts a single prediction, the other thirty: N is their sum, not a mean of two means."""
    model, tokens, _, _ = categorical()
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[0, 0] = True
    mask[1:6] = True
    truth = exact.exact_gauss_newton(model, tokens, exact.categorical_hessian, mask)
    forwards = [lambda: (model(tokens[:1]), mask[:1]), lambda: (model(tokens[1:]), mask[1:])]
    exact.assert_unbiased(exact.samples(GaussNewtonBartlett(), forwards, model, SAMPLES), truth, model)


@pytest.mark.parametrize("noise", ["labels", "signs"])
def test_trap_6_padded_vocabulary_is_never_sampled(noise):
    model, tokens, _, _ = categorical()
    real = exact.VOCAB - 4
    truth = exact.exact_gauss_newton(model, tokens, functools.partial(exact.categorical_hessian, real=real))
    estimator = GaussNewtonBartlett(noise=noise, vocab_size=real)
    exact.assert_unbiased(exact.samples(estimator, [lambda: model(tokens)], model, SAMPLES), truth, model)


def test_padding_rows_of_an_untied_head_get_no_curvature():
    model, tokens, _ = exact.build(outputs=16)
    estimates = GaussNewtonBartlett(vocab_size=13).estimate(
        [lambda: model(tokens)], list(model.parameters()), exact.refresh()
    )
    by_name = dict(zip([name for name, _ in model.named_parameters()], estimates, strict=True))
    assert (by_name["head.weight"][:13] > 0).any(-1).all()
    assert (by_name["head.weight"][13:] == 0).all()


def test_trap_7_the_estimate_is_about_the_position_that_was_given():
    """Only position 2 counts: parameters that position 2 cannot see have no curvature. Nothing is shifted."""
    model, tokens, _, _ = categorical()
    tokens = torch.arange(exact.CONTEXT).expand(exact.BATCH, -1)  # each position has its own embedding row
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[:, 2] = True
    model, _, _ = exact.build(outputs=5)
    estimates = GaussNewtonBartlett().estimate(
        [lambda: (model(tokens), mask)], list(model.parameters()), exact.refresh()
    )
    embedding = estimates[0].sum(-1)
    assert (embedding[:3] > 0).all()
    assert (embedding[3:] == 0).all()


@pytest.mark.parametrize("shape", ["elements", "rows"])
@pytest.mark.parametrize("noise", ["labels", "signs"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_other_likelihoods(likelihood, noise, shape):
    """Against the Gauss-Newton diagonal of torch's own mean losses, whose mean is over elements."""
    model, tokens, _ = exact.build(outputs=3)
    model_mean = {
        "bernoulli": lambda z: torch.diag_embed(z.sigmoid() * (1 - z.sigmoid())) / 3,
        "gaussian": lambda z: torch.diag_embed(torch.full_like(z, 2.0)) / 3,
    }[likelihood]
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(*tokens.shape, generator=generator) < 0.5
    truth = exact.exact_gauss_newton(model, tokens, model_mean, mask)
    given = mask if shape == "rows" else mask.unsqueeze(-1).expand(-1, -1, 3)
    estimator = GaussNewtonBartlett(likelihood=likelihood, noise=noise)
    exact.assert_unbiased(exact.samples(estimator, [lambda: (model(tokens), given)], model, SAMPLES), truth, model)


@pytest.mark.parametrize(
    ("likelihood", "loss"),
    [("bernoulli", F.binary_cross_entropy_with_logits), ("gaussian", F.mse_loss)],
)
def test_other_likelihoods_match_torch_losses_in_a_linear_model(likelihood, loss):
    """In a linear model the Gauss-Newton matrix is the Hessian: the convention of each loss is pinned to torch's."""
    inputs = torch.randn(40, 3, dtype=torch.float64)
    weight = torch.nn.Parameter(torch.randn(3, dtype=torch.float64))
    targets = torch.rand(40, dtype=torch.float64).round()
    hessian = torch.autograd.functional.hessian(lambda w: loss(inputs @ w, targets), weight.detach()).diagonal()
    estimator = GaussNewtonBartlett(likelihood=likelihood)
    drawn = torch.stack(
        [estimator.estimate([lambda: inputs @ weight], [weight], exact.refresh(step=t))[0] for t in range(4000)]
    )
    torch.testing.assert_close(drawn.mean(0), hessian, rtol=0.08, atol=0)


def test_single_vector_of_logits_is_one_prediction():
    weight = torch.nn.Parameter(torch.zeros(4))
    estimate = GaussNewtonBartlett().estimate([lambda: weight * 1.0], [weight], exact.refresh())[0]
    # p − onehot at uniform p = 1/4, squared: one entry (3/4)², the others (1/4)².
    assert sorted(estimate.tolist()) == pytest.approx([1 / 16, 1 / 16, 1 / 16, 9 / 16])


@pytest.mark.parametrize("vocab", [2, 10, 255, 256, 257, 1000, 5003])
def test_inverse_cdf_draws_from_the_distribution(vocab):
    """Each draw is the entry whose part of the cumulative sum holds the uniform number, and never an impossible one."""
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(64, vocab, generator=generator) * 3
    logits[:, ::3] = -torch.inf
    logits[:, 1] = 0
    probs = logits.softmax(-1)
    uniform = torch.rand(64, generator=generator).clamp(1e-7, 1 - 1e-7)
    drawn = sample_categorical(probs, uniform)
    assert (probs.gather(-1, drawn.unsqueeze(-1)) > 0).all()
    cdf = probs.double().cumsum(-1)
    upper = cdf.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    lower = upper - probs.double().gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    assert ((lower - 1e-6 <= uniform) & (uniform <= upper + 1e-6)).all()


@pytest.mark.parametrize("value", [1e-38, 1e-7, 0.5, 1 - 6e-8])
def test_inverse_cdf_at_the_ends(value):
    probs = torch.zeros(1, 700)
    probs[0, 300], probs[0, 600] = 0.5, 0.5
    assert sample_categorical(probs, torch.tensor([value])).item() in (300, 600)


def test_sampling_blocks_do_not_change_the_noise(monkeypatch):
    model, tokens, _, _ = categorical()
    params = list(model.parameters())
    for noise in ("labels", "signs"):
        estimator = GaussNewtonBartlett(noise=noise)
        whole = estimator.estimate([lambda: model(tokens)], params, exact.refresh())
        monkeypatch.setattr("sophia.optim.curvature.likelihood._BLOCK", 2 * exact.VOCAB + 1)
        cut = estimator.estimate([lambda: model(tokens)], params, exact.refresh())
        monkeypatch.undo()
        torch.testing.assert_close(exact.flat(cut), exact.flat(whole))


def test_noise_belongs_to_global_rows():
    """The same rows in another order, or in another cut, give the same chunk gradients."""
    model, tokens, _, _ = categorical()
    params = list(model.parameters())
    estimator = GaussNewtonBartlett()
    order = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])

    def estimate(forwards, rows):
        return exact.flat(estimator.estimate(forwards, params, exact.refresh(step=5, rows=rows)))

    plain = estimate([lambda: model(tokens)], torch.arange(8))
    assert torch.allclose(plain, estimate([lambda: model(tokens[order])], order))
    assert torch.allclose(plain, estimate([lambda: model(tokens)], None))  # one process: local rows are global
    assert not torch.allclose(plain, estimate([lambda: model(tokens)], torch.arange(8) + 8))
    halves = [lambda: model(tokens[:4]), lambda: model(tokens[4:])]
    assert torch.allclose(estimate(halves, torch.arange(8)), estimate(halves, None))


def test_noise_differs_from_step_to_step_and_seed_to_seed():
    model, tokens, _, _ = categorical()
    params = list(model.parameters())

    def estimate(**settings):
        return exact.flat(GaussNewtonBartlett().estimate([lambda: model(tokens)], params, exact.refresh(**settings)))

    assert torch.equal(estimate(step=1), estimate(step=1))
    assert not torch.allclose(estimate(step=1), estimate(step=2))
    assert not torch.allclose(estimate(step=1), estimate(step=1, seed=1))


def test_chunk_gradients_are_handed_over_with_their_counts():
    """What Kronecker factors will be made of: their squares are the diagonal estimate."""
    model, tokens, _, _ = categorical()
    params = list(model.parameters())
    estimator = GaussNewtonBartlett(chunks=4)
    parts = list(estimator.chunk_gradients([lambda: model(tokens)], params, exact.refresh()))
    assert [count for _, count in parts] == [2 * exact.CONTEXT] * 4
    total = sum(exact.flat(gradients).square() for gradients, _ in parts) / sum(count for _, count in parts)
    assert torch.allclose(total, exact.flat(estimator.estimate([lambda: model(tokens)], params, exact.refresh())))


def test_unused_and_frozen_parameters_have_no_estimate():
    model, tokens, _ = exact.build()
    model.norm.weight.requires_grad_(False)
    spare = torch.nn.Parameter(torch.zeros(3))
    estimates = GaussNewtonBartlett().estimate([lambda: model(tokens)], [*model.parameters(), spare], exact.refresh())
    missing = [
        name
        for name, e in zip([n for n, _ in model.named_parameters()] + ["spare"], estimates, strict=True)
        if e is None
    ]
    assert missing == ["norm.weight", "spare"]
