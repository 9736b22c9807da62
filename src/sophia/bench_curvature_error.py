"""The accuracy part of `sophia bench curvature`: estimates against the exact Gauss-Newton diagonal of a whole batch.

On a GPT small enough for the exact diagonal, in float64, after a little training, so that its predictions are not
uniform. Its text has the two traits that matter: frequent and rare tokens, and tokens that follow from the one before.
"""

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia.loss import CrossEntropy
from sophia.model import GPT, GPTConfig
from sophia.optim.curvature import Forward, GaussNewtonBartlett, Refresh, deferred_logits
from sophia.optim.noise import stream_key
from sophia.optim.replicas import Replicas

SHAPE = GPTConfig(vocab_size=64, context=32, layers=2, heads=2, width=32)
_TRAINING_STEPS = 100
_COTANGENTS = 256  # backward passes that run as one


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to estimate a batch's curvature."""

    rows: int
    """Sequences of the batch that it looks at, drawn anew each time."""
    chunks: int
    """Parts of them whose gradients are squared apart."""
    noise: Literal["labels", "signs"]
    """What is sent back."""


def recipes(rows: int) -> list[Recipe]:
    """What the table shows, for a batch of so many sequences; the first is the official one."""
    shares = [(rows, 1), (rows // 2, 1), (rows // 16, 1)]
    shares += [(rows // 16, 4), (rows // 8, 4), (rows // 8, 8), (rows, 4), (rows, 16)]
    found = [Recipe(rows=n, chunks=c, noise=noise) for n, c in shares for noise in ("labels", "signs") if c <= n]
    return list(dict.fromkeys(found))


def measure(rows: int, draws: int, tick: Callable[[str], None], config: GPTConfig = SHAPE) -> list[dict[str, Any]]:
    """ΣΔ²/Σexact² of every recipe against the exact diagonal of the whole batch, over independent draws.

    Args:
        rows: sequences of the batch.
        draws: estimates for each recipe.
        tick: is told what comes next.
        config: the model.

    Returns:
        {"rows", "share", "chunks", "noise", "error", "error_std", "error_min", "error_max", "median_coordinate"} a
        recipe; the last is the median over all coordinates of |Δ| / exact.
    """
    tick("training a small model")
    tokens = text(2 * rows, config)
    model = trained(config, tokens[rows:])
    batch = tokens[:rows, :-1]
    tick("its exact curvature")
    exact = exact_diagonal(model, batch)
    found = []
    for recipe in recipes(rows):
        tick(f"{recipe.rows} of {rows} sequences, {recipe.chunks} chunks, {recipe.noise}")
        drawn = [draw(recipe, model, batch, number) for number in range(draws)]
        errors = [relative_error(estimate, exact) for estimate in drawn]
        found.append(
            {
                **vars(recipe),
                "share": recipe.rows / rows,
                "error": statistics.fmean(errors),
                "error_std": statistics.stdev(errors),
                "error_min": min(errors),
                "error_max": max(errors),
                "median_coordinate": statistics.fmean(median_error(estimate, exact) for estimate in drawn),
            }
        )
    return found


def text(rows: int, config: GPTConfig) -> Tensor:
    """Ids, [rows, context + 1]: six in ten follow from the one before, the others by Zipf's law."""
    generator = torch.Generator().manual_seed(0)
    weights = 1.0 / torch.arange(1, config.vocab_size + 1)
    fresh = torch.multinomial(weights, rows * (config.context + 1), replacement=True, generator=generator)
    fresh = fresh.view(rows, -1)
    follows = torch.rand(fresh.shape, generator=generator) < 0.6
    for place in range(1, config.context + 1):
        successor = (5 * fresh[:, place - 1] + 7) % config.vocab_size
        fresh[:, place] = torch.where(follows[:, place], successor, fresh[:, place])
    return fresh


def trained(config: GPTConfig, tokens: Tensor) -> GPT:
    """A model in float64 after some steps on these ids."""
    model = GPT(config, torch.Generator().manual_seed(0)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(_TRAINING_STEPS):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], CrossEntropy(tokens[:, 1:])) / tokens[:, 1:].numel()
        torch.autograd.backward(loss)
        optimizer.step()
    return model


def exact_diagonal(model: GPT, tokens: Tensor) -> Tensor:
    """Diagonal of the Gauss-Newton matrix of the mean loss, Σ (Jᵀ S)² / N with S Sᵀ = diag p − p pᵀ; [parameters].

    Args:
        model: in float64.
        tokens: [rows, time].
    """
    values = {name: p.detach() for name, p in model.named_parameters()}

    def logits_of(row: Tensor, values: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(model, values, (row,))
        return result

    total = {name: torch.zeros_like(p) for name, p in values.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fast kernels cannot be batched
        for row in torch.split(tokens, 1):
            logits, pull_back, *_ = torch.func.vjp(functools.partial(logits_of, row), values)
            for cotangents in torch.split(_output_roots(logits), _COTANGENTS):
                (gradients,) = torch.func.vmap(pull_back)(cotangents)
                for name, gradient in gradients.items():
                    total[name] += gradient.square().sum(0)
    return flat(list(total.values())) / tokens.numel()


def _output_roots(logits: Tensor) -> Tensor:
    """The columns of S for every position, [time · vocab, 1, time, vocab], from logits [1, time, vocab]."""
    probs = logits.detach().squeeze(0).softmax(-1)
    root = probs.sqrt()
    columns = torch.diag_embed(root) - probs.unsqueeze(-1) * root.unsqueeze(-2)  # [time, vocab, column]
    time, vocab = probs.shape
    placed = torch.zeros(time, vocab, time, vocab, dtype=probs.dtype)
    every = torch.arange(time)
    placed[every, :, every] = columns.transpose(1, 2)
    return placed.view(time * vocab, 1, time, vocab)


def draw(recipe: Recipe, model: GPT, batch: Tensor, number: int) -> Tensor:
    """One estimate, [parameters]: rows and noise are a function of its number."""
    generator = torch.Generator().manual_seed(stream_key(7, number) % 2**63)
    rows = torch.randperm(len(batch), generator=generator)[: recipe.rows]
    parts = [rows[chunk :: recipe.chunks] for chunk in range(recipe.chunks)]
    forwards: list[Forward] = [functools.partial(model, batch[part], deferred_logits) for part in parts]
    refresh = Refresh(seed=0, step=number, scale=1.0, replicas=Replicas(None, "mean"), rows=torch.cat(parts))
    estimates = GaussNewtonBartlett(noise=recipe.noise).estimate(forwards, list(model.parameters()), refresh)
    return flat([e for e in estimates if e is not None])


def relative_error(estimate: Tensor, exact: Tensor) -> float:
    """ΣΔ² / Σ exact²."""
    return float((estimate - exact).square().sum() / exact.square().sum())


def median_error(estimate: Tensor, exact: Tensor) -> float:
    """The median of |Δ| / exact, over coordinates that have curvature."""
    curved = exact > 0
    return float(((estimate - exact).abs()[curved] / exact[curved]).median())


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all."""
    return torch.cat([tensor.flatten() for tensor in tensors])
