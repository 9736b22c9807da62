"""Counts of parameters and operations, against the model itself and PyTorch's counter."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sophia.accounting import count_parameters, curvature_share, flops_per_token, recomputed_flops_per_token
from sophia.model import GPT, GPTConfig

SHAPE = {"vocab_size": 90, "context": 16, "layers": 3, "heads": 2, "width": 24}


@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"padded_vocab_size": 128, "bias": True}])
def test_parameters_are_those_of_the_model(settings):
    config = GPTConfig(**SHAPE, **settings)
    model, count = GPT(config), count_parameters(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.vectors == sum(p.numel() for p in model.parameters() if p.ndim < 2)
    assert count.multiplied == sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2) - 16 * 24


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_pytorch_counts(checkpointing):
    """Attention in its plain form, whose products the counter sees."""
    config = GPTConfig(**SHAPE, activation_checkpointing=checkpointing)
    model, tokens = GPT(config), torch.randint(0, 90, (2, 16))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    expected = flops_per_token(config) + (recomputed_flops_per_token(config) if checkpointing else 0)
    assert counter.get_total_flops() == expected * tokens.numel()


def test_gpt2_small_needs_eight_tenths_of_a_gigaflop_a_token():
    config = GPTConfig(vocab_size=50304, context=1024, layers=12, heads=12, width=768)
    assert flops_per_token(config) == 6 * (12 * 12 * 768**2 + 50304 * 768) + 12 * 12 * 768 * 1024
    assert flops_per_token(config, context=512) < flops_per_token(config)


def test_curvature_costs_a_percent():
    assert curvature_share("sophia-g", rows_fraction=1 / 8) == 0.0125
    assert curvature_share("sophia-h", rows_fraction=1 / 8) > 0.02
    assert curvature_share("sophia-k", rows_fraction=1 / 8) == 0.0125
    assert curvature_share("adamw", rows_fraction=1 / 8) == 0
