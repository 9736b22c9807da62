"""Presets: the sizes of the paper, and settings that the optimizers take."""

import pytest
import torch

from sophia.accounting import count_parameters
from sophia.config import OptimizerSettings
from sophia.model import GPT, GPTConfig
from sophia.optimizers import Optimizers
from sophia.presets import OPTIMIZERS, PRESETS, preset

PAPER = {  # millions of parameters as the paper counts them, layers, heads, width
    "30m": (30, 6, 6, 384),
    "gpt2-small": (125, 12, 12, 768),
    "gpt2-medium": (355, 24, 16, 1024),
    "540m": (540, 30, 18, 1152),
    "gpt2-large": (770, 36, 20, 1280),
    "gpt2-xl": (1500, 48, 24, 1536),
}


@pytest.mark.parametrize("name", PAPER)
def test_sizes_of_the_paper(name):
    millions, layers, heads, width = PAPER[name]
    chosen = preset(name)
    assert (chosen.layers, chosen.heads, chosen.width) == (layers, heads, width)
    assert count_parameters(chosen.config(50257)).total / 1e6 == pytest.approx(millions, rel=0.05)
    assert (chosen.context, chosen.tokens_per_step, chosen.steps, chosen.warmup_steps) == (1024, 491_520, 100_000, 2000)


def test_peak_learning_rates_that_were_seen_in_the_source():
    seen = {
        "gpt2-small": {"adamw": 6e-4, "lion": 1e-4, "sophia-g": 6e-4},
        "gpt2-medium": {"adamw": 3e-4, "lion": 1e-4, "sophia-g": 7e-4},
        "gpt2-large": {"adamw": 2e-4, "lion": 8e-5, "sophia-g": 3e-4},
    }
    for name, rates in seen.items():
        assert {optimizer: preset(name).recipes[optimizer]["lr"] for optimizer in rates} == rates


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_whole(name):
    chosen = preset(name)
    assert chosen.name == name
    assert set(chosen.recipes) == set(OPTIMIZERS)
    assert chosen.tokens_per_step % chosen.context == 0
    assert 0 < chosen.warmup_steps < chosen.steps
    for optimizer, recipe in chosen.recipes.items():
        expected = {"lr", "beta1", "beta2", "weight_decay"} | ({"gamma"} if optimizer.startswith("sophia") else set())
        assert set(recipe) == expected - ({"beta2"} if optimizer == "signum" else set())
        assert all(0 < value < 1 for value in recipe.values())
        with pytest.raises(TypeError):
            recipe["lr"] = 1.0  # shared by all who ask


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_trainers_optimizers_take_the_recipes(optimizer):
    model = GPT(GPTConfig(vocab_size=16, context=4, layers=1, heads=1, width=4))
    rest = {"curvature_rows": 1} if optimizer.startswith("sophia") else {}
    rest |= {"curvature_chunks": 1} if optimizer in ("sophia-g", "sophia-k") else {}
    settings = OptimizerSettings(optimizer=optimizer, **preset("nano").recipes[optimizer], **rest)
    group = Optimizers(settings, model, seed=0).parts[0].param_groups[0]
    assert group["lr"] == preset("nano").recipes[optimizer]["lr"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_short_runs_have_short_memories(optimizer):
    # nano's and micro's settings were searched together: they differ in nothing but the learning rate.
    nano, micro = (dict(preset(name).recipes[optimizer]) for name in ("nano", "micro"))
    assert nano.pop("lr") > micro.pop("lr")
    assert nano == micro


def test_a_config_takes_vocabulary_and_changes():
    config = preset("gpt2-medium").config(5000, context=64, padded_vocab_size=5056)
    assert (config.vocab_size, config.context, config.width, config.head_rows) == (5000, 64, 1024, 5056)
    assert config.attention_scale_by_layer
    assert not preset("gpt2-small").config(5000).attention_scale_by_layer


@pytest.mark.parametrize(("name", "words"), [("gpt2-smal", "did you mean gpt2-small"), ("llama", "there are nano")])
def test_an_unknown_name_is_answered_with_a_known_one(name, words):
    with pytest.raises(ValueError, match=words):
        preset(name)


def test_models_for_cpus_have_the_size_they_claim():
    with torch.device("meta"):
        nano, micro = GPT(preset("nano").config(1024)), GPT(preset("micro").config(8192))
    assert nano.num_parameters == pytest.approx(0.94e6, rel=0.01)
    assert micro.num_parameters == pytest.approx(10.1e6, rel=0.01)
