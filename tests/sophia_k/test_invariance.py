"""Rotating a layer's inputs, and its weights with them, changes no function that is trained: the basis turns along."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import SophiaG, SophiaK

INPUTS, HIDDEN, CLASSES, ROWS, STEPS, INTERVAL = 6, 9, 5, 48, 9, 3
ROTATED, _ = torch.linalg.qr(
    torch.randn(INPUTS, INPUTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
)


def net(hidden):
    source = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(INPUTS, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=source, dtype=torch.float64))
    return model


def batch(step):
    source = torch.Generator().manual_seed(100 + step)
    scales = torch.linspace(2, 0.3, INPUTS, dtype=torch.float64)  # statistics with eigenvalues far apart
    x = torch.randn(ROWS, INPUTS, generator=source, dtype=torch.float64) * scales
    return x, torch.randint(0, CLASSES, (ROWS,), generator=source)


def outputs(kind, rotation, hidden=HIDDEN, **settings):
    """Logits for a batch that no step was made from, and how far the training has changed them."""
    model = net(hidden)
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight @ rotation)
    seen = batch(STEPS)[0] @ rotation
    start = model(seen).detach()
    # Logits gain nothing from a constant, so the outer matrix has a direction without curvature, in which the momentum
    # is rounding alone: neither `rtol` nor, where it is not turned, ε makes it a step.
    eps = 1e-12 if settings.get("basis") == "both" else 1e-6
    optimizer = kind(model.parameters(), lr=0.05, curvature_interval=INTERVAL, seed=3, eps=eps, **settings)
    for step in range(STEPS):
        x, y = batch(step)
        x = x @ rotation
        # 16 chunks: every side's statistics have full rank.
        optimizer.refresh_curvature([functools.partial(model, part) for part in x.split(3)])
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert optimizer.refreshes == STEPS // INTERVAL
    end = model(seen).detach()
    return end, (end - start).abs().max()


def difference(kind, **settings):
    """Between training with and without rotated inputs, relative to what training changes."""
    plain, moved = outputs(kind, torch.eye(INPUTS, dtype=torch.float64), **settings)
    rotated, _ = outputs(kind, ROTATED, **settings)
    assert moved > 0.2
    return float((rotated - plain).abs().max() / moved)


PLAIN = {"orthogonalize": 0, "update_rms": None, "nesterov": False}


@pytest.mark.parametrize(
    "settings",
    [
        {"basis": "both"},
        {"basis": "both", **PLAIN},
        {"basis": "both", "clip": False, "exponent": 0.5},
        {"basis": "both", "others": "curvature"},
        {"basis": "both", "diagonal": "gradients", "exponent": 0.5, "gamma": 1.0},
        {"basis": "smaller"},  # the inputs' side, of 6 of 9
        {"basis": "smaller", **PLAIN},
    ],
    ids=str,
)
def test_a_basis_of_the_inputs_side_makes_training_invariant(settings):
    assert difference(SophiaK, **settings) < 1e-8


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (SophiaG, {}),
        (SophiaK, {"basis": "none"}),
        (SophiaK, {"basis": "none", **PLAIN}),
        (SophiaK, {"basis": "both", "max_basis_dim": INPUTS - 1}),
        (SophiaK, {"basis": "smaller", "hidden": INPUTS - 1}),  # the other side
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_without_it_training_is_not(kind, settings):
    assert difference(kind, **settings) > 1e-3
