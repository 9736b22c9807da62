"""Each baseline as the trainer builds it, with groups, exceptions and a schedule, against its paper's formulas."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from sophia.config import OptimizerSettings
from sophia.optimizers import Optimizers
from tests.baselines import references

LR, DECAY, BETA1, BETA2 = 3e-2, 1.0, 0.9, 0.96
ADAMW = functools.partial(references.AdamW, BETA1, BETA2)
# Optimizer -> how its rule begins for the embedding, the block's matrix and the vector, and how near they have to be:
# torch counts NAdam's product of momenta in fp32 and multiplies Muon's matrices in bf16.
RULES = {
    "adamw": ([ADAMW] * 3, 1e-12),
    "nadamw": ([functools.partial(references.NAdamW, BETA1, BETA2)] * 3, 1e-6),
    "lion": ([functools.partial(references.Lion, BETA1, BETA2)] * 3, 1e-12),
    "signum": ([functools.partial(references.Signum, BETA1)] * 3, 1e-12),
    # Muon's momentum is its own; AdamW beside it has beta1 0.9.
    "muon": ([ADAMW, functools.partial(references.Muon, BETA1), ADAMW], 3e-3),
    # The vocabulary is larger than any side of the block's matrix, and not turned.
    "soap": (
        [
            functools.partial(references.SOAP, BETA1, BETA2, 3, sides=(False, True)),
            functools.partial(references.SOAP, BETA1, BETA2, 3),
            ADAMW,
        ],
        1e-9,
    ),
}


class Model(nn.Module):
    """An embedding, a block's matrix and a vector under the names that GPT has."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.tokens = nn.Embedding(11, 6, dtype=torch.float64)
        self.blocks = nn.ModuleList([nn.Linear(6, 6, bias=False, dtype=torch.float64)])
        self.norm = nn.LayerNorm(6, bias=False, dtype=torch.float64)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64))


def trained(name, *, steps=40, **settings):
    """How far each parameter is from the reference after some steps, relative to how far it went."""
    model = Model()
    chosen = {"lr": LR, "beta1": BETA1, "beta2": None if name == "signum" else BETA2, "weight_decay": DECAY, **settings}
    chosen |= {"basis_interval": 3} if name == "soap" else {}
    optimizers = Optimizers(OptimizerSettings(optimizer=name, **chosen), model, seed=0)
    parameters = list(model.parameters())
    starts = [p.detach().numpy().copy() for p in parameters]
    theta, rules = list(starts), [begin() for begin in RULES[name][0]]
    draw = np.random.default_rng(1)
    scales = [np.exp(draw.normal(size=p.shape)) for p in parameters]  # so that squares matter
    for step in range(steps):
        factor = 1 / (1 + 0.1 * step)
        optimizers.set_lr(factor)
        for index, p in enumerate(parameters):
            g = draw.normal(size=p.shape) * scales[index] + 0.3
            p.grad = torch.from_numpy(g.copy())
            own_lr, own_decay = (0.5, 0.25) if index == 0 else (1.0, DECAY if index == 1 else 0.0)
            theta[index] = rules[index].step(theta[index], g, LR * factor * own_lr, own_decay)
        optimizers.step()
    found = [p.detach().numpy() for p in parameters]
    return [
        np.linalg.norm(ours - theirs) / np.linalg.norm(theirs - start)
        for ours, theirs, start in zip(found, theta, starts, strict=True)
    ]


EXCEPTIONS = {"lr_by_name": ("tokens.*=0.5",), "decay_by_name": ("tokens.*=0.25",)}


@pytest.mark.parametrize("name", RULES)
def test_it_is_the_papers_rule(name):
    """With decay 1, vectors without decay, the embedding at a learning rate and a decay of its own."""
    assert max(trained(name, **EXCEPTIONS)) < RULES[name][1]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "other",
    [
        {"lr": LR * 1.1},
        {"weight_decay": 0.5},
        {"beta1": 0.8},
        {"lr_by_name": ("tokens.*=0.6",)},
        {"decay_by_name": ("tokens.*=0.0",)},
        {"decay_by_name": ("tokens.*=0.25", "norm.*=1")},
    ],
    ids=str,
)
def test_the_comparison_notices_other_settings(name, other):
    assert max(trained(name, **{**EXCEPTIONS, **other})) > 3 * RULES[name][1]


@pytest.mark.parametrize("name", ["adamw", "nadamw", "lion", "soap"])
def test_beta2_is_used(name):
    assert max(trained(name, **EXCEPTIONS, beta2=0.9)) > 1e-3


def _with_torchs_nadam(reference, **settings):
    p = torch.linspace(-1, 1, 7, dtype=torch.float64).requires_grad_()
    theta = p.detach().numpy().copy()
    optimizer = torch.optim.NAdam([p], lr=LR, betas=(BETA1, BETA2), decoupled_weight_decay=True, **settings)
    draw = np.random.default_rng(2)
    for _ in range(30):
        g = draw.normal(size=7)
        p.grad = torch.from_numpy(g)
        optimizer.step()
        theta = reference.step(theta, g, LR, 0.0)
    return np.abs(p.detach().numpy() - theta).max()


def test_torchs_schedule_of_the_momentum_is_not_the_papers():
    """Why the trainer's NAdamW holds μ: with its schedule torch averages gradients by β1, the paper by μ_t."""
    assert _with_torchs_nadam(references.NAdamWithSchedule(BETA1, BETA2)) > 1e-2
    assert _with_torchs_nadam(references.NAdamWithSchedule(BETA1, BETA2, psi=1e6), momentum_decay=1e6) < 1e-6
    assert _with_torchs_nadam(references.NAdamW(BETA1, BETA2), momentum_decay=1e6) < 1e-6
