"""Rows of the head beyond the vocabulary: no probability, no gradient, no curvature, no cost."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sophia import SophiaG, SophiaH
from sophia.curvature import GaussNewtonBartlett, Hutchinson
from sophia.model import GPT, GPTConfig, padded_vocabulary

IDS, ROWS = 50, 64
SHAPE = {"context": 16, "layers": 2, "heads": 2, "width": 8}


def pair(**settings):
    """The same model without and with padding, and tokens."""
    models = []
    for rows in (None, ROWS):
        torch.manual_seed(0)
        models.append(GPT(GPTConfig(vocab_size=IDS, padded_vocab_size=rows, **SHAPE, **settings)))
    return *models, torch.randint(0, IDS, (3, 12))


def loss_of(model, tokens):
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())


def test_padding_has_no_probability_and_changes_nothing_else():
    plain, padded, tokens = pair()
    logits = padded(tokens)
    assert logits.shape == (3, 12, ROWS)
    assert (logits[..., IDS:] == -math.inf).all()
    assert torch.equal(logits[..., :IDS], plain(tokens))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_are_those_without_padding(precision):
    plain, padded, tokens = pair()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        losses = [loss_of(model, tokens) for model in (plain, padded)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    gradients = {name: p.grad for name, p in padded.named_parameters()}
    assert (gradients["tokens.weight"][IDS:] == 0).all()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(gradients[name][: len(p)], p.grad, rtol=1e-4, atol=1e-6)


def test_a_model_in_bf16_masks_too():
    *_, padded, tokens = pair()
    logits = padded.to(torch.bfloat16)(tokens)
    assert (logits[..., IDS:] == -math.inf).all()
    assert logits[..., :IDS].isfinite().all()


class _BigResults(TorchDispatchMode):
    """Operations whose result has the size of the logits, views apart."""

    def __init__(self, size):
        super().__init__()
        self.size, self.names = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.size and not function.is_view:
            self.names.append(str(function))
        return result


@pytest.mark.parametrize(("rows", "product"), [(None, "mm"), (ROWS, "addmm")])
def test_logits_are_written_once(rows, product):
    """The mask is the product's bias; without padding there is no bias at all."""
    model, tokens = (
        GPT(GPTConfig(vocab_size=IDS, padded_vocab_size=rows, **SHAPE)),
        torch.zeros(3, 12, dtype=torch.long),
    )
    with torch.no_grad(), _BigResults(36 * (rows or IDS)) as mode:
        model(tokens)
    names = [name for name in mode.names if "view" not in name]
    assert [name.split(".")[1] for name in names] == [product]


@pytest.mark.parametrize("rows", [None, 51, ROWS, 128])
def test_initial_weights_and_the_generator_after_them_do_not_depend_on_padding(rows):
    torch.manual_seed(7)
    plain = GPT(GPTConfig(vocab_size=IDS, **SHAPE))
    after = torch.rand(1)
    torch.manual_seed(7)
    padded = GPT(GPTConfig(vocab_size=IDS, padded_vocab_size=rows, **SHAPE))
    assert torch.equal(torch.rand(1), after)
    for a, b in zip(plain.parameters(), padded.parameters(), strict=True):
        assert torch.equal(a, b[: len(a)])
    assert (padded.tokens.weight[IDS:] == 0).all()


def test_the_state_is_the_parameters_and_nothing_else():
    """A buffer would be broadcast by DDP at every step, and be garbage after `to_empty`."""
    plain, padded, _ = pair()
    assert padded.state_dict().keys() == plain.state_dict().keys()
    assert list(padded.buffers()) == []
    assert padded.num_parameters == plain.num_parameters


def test_copies_are_padded_too():
    *_, padded, tokens = pair()
    assert torch.equal(copy.deepcopy(padded)(tokens), padded(tokens))


@pytest.mark.parametrize("noise", ["labels", "signs"])
def test_curvature_of_padding_is_zero(noise):
    plain, padded, tokens = pair()
    hessians = []
    for model in (plain, padded):
        estimator = GaussNewtonBartlett(noise=noise, vocab_size=IDS if noise == "signs" and model is padded else None)
        optimizer = SophiaG(model.parameters(), lr=1e-3, estimator=estimator)
        assert optimizer.refresh_curvature(lambda model=model: model(tokens))
        loss_of(model, tokens).backward()
        optimizer.step()
        hessians.append({name: optimizer.state[p]["hessian"] for name, p in model.named_parameters()})
    assert (hessians[1]["tokens.weight"][IDS:] == 0).all()
    assert (hessians[1]["tokens.weight"][:IDS] > 0).any()
    for name, hessian in hessians[1].items():
        assert hessian.isfinite().all(), name
        expected = hessians[0][name]
        torch.testing.assert_close(hessian[: len(expected)], expected, rtol=1e-3, atol=1e-9)
    assert all(p.isfinite().all() for p in padded.parameters())
    assert (padded.tokens.weight[IDS:] == 0).all()


def test_signs_without_being_told_of_the_padding():
    *_, padded, tokens = pair()
    optimizer = SophiaG(padded.parameters(), lr=1e-3, estimator=GaussNewtonBartlett(noise="signs"))
    assert optimizer.refresh_curvature(lambda: padded(tokens))
    assert optimizer.stats()["refused_refreshes"] == 0
    loss_of(padded, tokens).backward()
    optimizer.step()
    assert (optimizer.state[padded.tokens.weight]["hessian"][IDS:] == 0).all()


@pytest.mark.parametrize("product", ["double_backward", "finite_difference"])
def test_hutchinson_on_a_padded_model(product):
    *_, padded, tokens = pair()
    optimizer = SophiaH(padded.parameters(), lr=1e-3, estimator=Hutchinson(product=product))
    assert optimizer.refresh_curvature(lambda: loss_of(padded, tokens))
    hessian = optimizer.state[padded.tokens.weight]["hessian"]
    assert hessian.isfinite().all()
    assert (hessian[IDS:] == 0).all()
    assert (hessian[:IDS] != 0).any()


@pytest.mark.parametrize(
    ("ids", "multiple", "rows"), [(50257, 128, 50304), (50304, 128, 50304), (1, 64, 64), (65, 64, 128)]
)
def test_padded_vocabulary(ids, multiple, rows):
    assert padded_vocabulary(ids, multiple) == rows
