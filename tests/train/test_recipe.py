"""`recipe = "paper"`: the rule and its settings as published, at any size, whatever presets and defaults come to be."""

import inspect

import pytest
import torch

from sophia import SophiaG, SophiaH, SophiaK
from sophia.config import BatchSettings, ModelSettings, OptimizerSettings, TrainSettings
from sophia.meaning import MATRIX_SETTINGS
from sophia.model import GPT, GPTConfig
from sophia.optim.checks import CLIP_TARGET
from sophia.optimizers import Optimizers
from sophia.presets import PRESETS
from sophia.resolve import resolve_optimizer

CLASSES = {"sophia-g": SophiaG, "sophia-h": SophiaH}


def resolved(model="nano", rows=None, **chosen):
    batch = BatchSettings(tokens_per_step=rows and rows * PRESETS[model].context)
    settings = TrainSettings(model=ModelSettings(model=model), optimizer=OptimizerSettings(**chosen), batch=batch)
    return resolve_optimizer(settings).optimizer


@pytest.mark.parametrize("model", PRESETS)
@pytest.mark.parametrize("optimizer", CLASSES)
def test_sophia_as_published(optimizer, model):
    """Algorithm 3, section 3; every setting that the rule or the estimate depends on."""
    chosen, paper = resolved(model, optimizer=optimizer, recipe="paper"), CLASSES[optimizer].PAPER
    assert chosen.lr == PRESETS[model].recipes[optimizer]["lr"]  # the paper's too, where it has one
    assert ((chosen.beta1, chosen.beta2), chosen.gamma, chosen.eps) == (paper["betas"], paper["gamma"], paper["eps"])
    assert (chosen.weight_decay, chosen.max_grad_norm) == (paper["weight_decay"], 1.0) == (0.2, 1.0)
    assert chosen.curvature_interval == paper["curvature_interval"] == 10
    assert (chosen.bias_correction, chosen.clip_target, chosen.refresh_when) == (False, None, "before")
    assert chosen.curvature_noise == ("labels" if optimizer == "sophia-g" else None)
    assert chosen.state_dtype == "fp32"
    rows = PRESETS[model].tokens_per_step // PRESETS[model].context
    if optimizer == "sophia-g":  # 240 of 480 sequences
        assert (chosen.curvature_rows, chosen.curvature_chunks) == (rows // 2, 1)
    else:  # 32 of 480
        assert chosen.curvature_rows == max(1, rows // 15)


def test_of_480_sequences():
    assert resolved("30m", recipe="paper").curvature_rows == 240
    assert resolved("30m", recipe="paper", optimizer="sophia-h").curvature_rows == 32
    assert resolved("30m", recipe="paper", optimizer="sophia-h", rows=4).curvature_rows == 1


def test_the_others_that_the_paper_ran():
    adamw, lion = (resolved(optimizer=name, recipe="paper") for name in ("adamw", "lion"))
    assert (adamw.beta1, adamw.beta2, adamw.weight_decay) == (0.9, 0.95, 0.1)
    assert (lion.beta1, lion.beta2, lion.weight_decay) == (0.95, 0.98, 0.2)


@pytest.mark.parametrize("optimizer", ["muon", "soap", "signum", "nadamw", "sophia-k"])
def test_what_the_paper_did_not_run_is_refused(optimizer):
    with pytest.raises(ValueError, match=f"recipe is paper, which has no settings for {optimizer}: leave it out"):
        resolved(optimizer=optimizer, recipe="paper")


def test_what_is_given_counts_more():
    chosen = resolved(recipe="paper", gamma=0.3, curvature_chunks=2, lr=1e-2, eps=1e-8)
    assert (chosen.gamma, chosen.curvature_chunks, chosen.lr, chosen.eps) == (0.3, 2, 1e-2, 1e-8)
    assert chosen.beta1 == 0.96


def test_the_preset_is_the_default():
    chosen = resolved()
    assert {name: getattr(chosen, name) for name in ("beta1", "gamma")} == {"beta1": 0.9, "gamma": 0.5}
    assert chosen.eps == 1e-12


def test_gamma_auto_has_a_target():
    assert resolved(gamma="auto").clip_target == CLIP_TARGET
    assert resolved(gamma="auto", clip_target=0.5).clip_target == 0.5
    assert resolved(gamma="auto", optimizer="sophia-h", recipe="paper").gamma == "auto"


@pytest.mark.parametrize("model", PRESETS)
def test_nothing_of_sophia_k_is_left_open(model):
    """What the preset does not say is the library's default; an estimate is made of as much as Sophia-G's."""
    chosen, theirs = resolved(model, optimizer="sophia-k"), resolved(model, optimizer="sophia-g")
    library = inspect.signature(SophiaK).parameters
    assert (chosen.split_qkv, chosen.product_dtype) == (True, "auto")
    names = {"eps", "curvature_interval", *MATRIX_SETTINGS} - {"split_qkv", "product_dtype"}
    assert {name: getattr(chosen, name) for name in names} == {name: library[name].default for name in names}
    assert (chosen.beta1, chosen.beta2, chosen.gamma) == (*library["betas"].default, library["gamma"].default)
    assert chosen.curvature_noise == "signs"
    assert (chosen.curvature_rows, chosen.curvature_chunks) == (theirs.curvature_rows, theirs.curvature_chunks)


def test_what_is_given_to_sophia_k_stays():
    given = {"basis": "none", "factors": "gradients", "diagonal": "gradients", "exponent": 1.0, "clip": False}
    given |= {"orthogonalize": 0, "update_rms": 0.0, "nesterov": False, "others": "curvature"}
    given |= {"nu": 0.3, "split_qkv": False, "product_dtype": "bf16"}
    given |= {"curvature_noise": "labels", "curvature_rows": 3, "curvature_chunks": 2, "gamma": 1.0, "eps": 1e-8}
    chosen = resolved(optimizer="sophia-k", **given)
    assert {name: getattr(chosen, name) for name in given} == given
    assert given.keys() >= set(MATRIX_SETTINGS)
    assert not any(given[name] == default for name, default in MATRIX_SETTINGS.items())


@pytest.mark.parametrize("given", [{}, {"basis": "none", "orthogonalize": 0, "update_rms": 0.0}], ids=str)
def test_what_is_left_open_reaches_sophia_k(given):
    """Also where some of it has no effect: only who asks for that is refused."""
    model = GPT(GPTConfig(vocab_size=11, context=6, layers=1, heads=2, width=8), torch.Generator().manual_seed(0))
    (sophia,) = Optimizers(resolved(optimizer="sophia-k", **given), model, seed=0).parts
    fused = model.blocks[0].attention.queries_keys_values.weight
    found = {p: group for group in sophia.param_groups for p in group["params"]}
    for group in found.values():
        assert (group["nu"], group["exponent"], group["gamma"]) == (0.5, 0.5, 0.05)
        assert group["betas"] == ((0.9, 0.95) if group["hidden"] else (0.9, 0.98))
        assert (group["update_rms"], group["product_dtype"]) == ((None, None) if given else (0.1, "auto"))
        assert group["lr"] == resolved(optimizer="sophia-k").lr
    assert {p for p, group in found.items() if group["split"] == 3} == (set() if given else {fused})
    if given:
        with pytest.raises(ValueError, match=r"product_dtype=torch\.bfloat16 has no effect"):
            Optimizers(resolved(optimizer="sophia-k", product_dtype="bf16", **given), model, seed=0)


OF_GRADIENTS = {"factors": "gradients", "diagonal": "gradients"}


@pytest.mark.parametrize("settings", [OF_GRADIENTS, {"basis": "none", "diagonal": "gradients"}], ids=str)
def test_what_estimates_no_curvature_has_no_settings_of_an_estimate(settings):
    names = ("curvature_rows", "curvature_chunks", "curvature_noise")
    chosen = resolved(optimizer="sophia-k", **settings)
    assert {getattr(chosen, name) for name in names} == {None}
    assert chosen.eps is not None
    assert resolved(optimizer="sophia-k", **settings, others="curvature").curvature_rows is not None
    for name, value in zip(names, (2, 2, "labels"), strict=True):
        message = rf"{name} is {value}, but this sophia-k is made of gradients alone .*: leave it out, or choose"
        with pytest.raises(ValueError, match=message):
            resolved(optimizer="sophia-k", **settings, **{name: value})
        assert getattr(resolved(optimizer="sophia-k", **settings, others="curvature", **{name: value}), name) == value


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sophia-g", "sophia-h", "torch.optim:SGD"])
def test_what_earlier_versions_wrote_for_all_is_no_mistake(optimizer):
    """config.toml of any run folder had curvature_noise = "labels"."""
    assert resolved(optimizer=optimizer, curvature_noise="labels", lr=1e-3).curvature_noise == "labels"
    if optimizer != "sophia-g":
        with pytest.raises(ValueError, match="curvature_noise has no meaning"):
            resolved(optimizer=optimizer, curvature_noise="signs", lr=1e-3)
