"""The cost part of `sophia bench curvature`: refreshes beside the training steps between them, in interleaved rounds.

A step of many micro-batches takes as long as that many times one of them, and so does a refresh from many sequences. So
one micro-batch of each kind is timed, and the rest is multiplication:

    percent = 100 · (rows / rows timed · refresh + fold) / (k · (rows of a step / rows timed · micro-batch + step))
"""

import contextlib
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sophia.config import OptimizerSettings
from sophia.distributed import World
from sophia.model import GPT, GPTConfig
from sophia.optim.curvature import Estimator, Forward, GaussNewtonBartlett, Hutchinson, Refresh, deferred_logits
from sophia.optim.curvature.likelihood import output_noise
from sophia.optim.noise import row_keys
from sophia.optim.replicas import Replicas
from sophia.optim.sophia import Sophia
from sophia.optimizers import Optimizers
from sophia.presets import CURVATURE_INTERVAL
from sophia.step import Stepper
from sophia.timing import timed

Run = Callable[[], object]

OFFICIAL = "official"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is timed."""

    config: GPTConfig
    """The model."""
    recipe: dict[str, Any]
    """Sophia-G's settings in the preset."""
    total_rows: int
    """Sequences of a training step."""
    micro_batch: int
    """Of them in one forward pass."""
    curvature_rows: int
    """Sequences of an estimate, as the trainer has them by default."""
    curvature_chunks: int
    """Its parts."""
    device: torch.device
    """Where."""
    precision: str
    """ "bf16" or "fp32"."""
    compile: bool
    """Through torch.compile."""

    @property
    def chunk_rows(self) -> int:
        """Sequences in a forward pass of our refresh; never more than in one of training."""
        return min(self.micro_batch, math.ceil(self.curvature_rows / self.curvature_chunks))

    @property
    def product_rows(self) -> int:
        """Sequences in a forward pass of Hutchinson's, which needs more memory for each."""
        return max(1, self.micro_batch // 4)

    def autocast(self) -> AbstractContextManager[object]:
        """Of forward passes."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def measure(setup: Setup, rounds: int, tick: Callable[[str], None]) -> dict[str, Any]:
    """{"seconds": {what: {"rows", "rounds"}}, "refreshes": [{"name", "rows", "percent", …}]}."""
    tick("building the model")
    runs = contenders(setup)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, (run, _) in runs.items():
            tick(f"round {number} of {rounds}: {name}" if number else f"warming up: {name}")
            seconds[name].append(timed(run, setup.device))
    for times in seconds.values():
        del times[0]
    return {
        "seconds": {name: {"rows": runs[name][1], "rounds": seconds[name]} for name in runs},
        "refreshes": [_in_percent(setup, *line, seconds, runs) for line in _refreshes(setup)],
    }


def measure_sampling(setup: Setup, rounds: int, tick: Callable[[str], None]) -> dict[str, Any]:
    """What the noise of a whole batch costs, in percent of a training step: {"vocab_size", "training", kinds: …}."""
    vocab = setup.config.head_rows
    tick(f"building the model for a vocabulary of {vocab}")
    stepper, ids = _stepper(setup)
    inputs, targets = ids[: setup.micro_batch, :-1], ids[: setup.micro_batch, 1:]
    runs: dict[str, Run] = {"training": functools.partial(stepper.gradients, inputs, targets, index=0)}
    runs |= sampling(setup, vocab)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            tick(f"vocabulary of {vocab}, round {number} of {rounds}: {name}")
            seconds[name].append(timed(run, setup.device))
    for times in seconds.values():
        del times[0]
    training = seconds.pop("training")
    return {
        "vocab_size": vocab,
        "predictions": inputs.numel(),
        "training": summary(training),
        "results": {
            name: {
                "seconds": summary(times),
                "percent": summary([100 * own / step for own, step in zip(times, training, strict=True)]),
            }
            for name, times in seconds.items()
        },
    }


def contenders(setup: Setup) -> dict[str, tuple[Run, int]]:
    """What is timed, and how many sequences each call takes; in the order of a training step."""
    stepper, ids = _stepper(setup)
    model, optimizers = stepper.model, stepper.optimizers
    (sophia,) = optimizers.parts
    assert isinstance(sophia, Sophia)
    params = [p for group in sophia.param_groups for p in group["params"]]
    kept: list[Sequence[Tensor | None]] = [[torch.zeros_like(p) for p in params]]
    sophia.update_curvature(kept[0])  # or the first step would refuse to be one

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        return ids[:rows, :-1], ids[:rows, 1:]

    def step() -> None:
        stepper.clip()
        optimizers.step()
        optimizers.zero_grad()

    def estimate(estimator: Estimator, forward: Forward) -> None:
        refresh = Refresh(seed=0, step=1, scale=1.0, replicas=Replicas(None, "mean"))
        with setup.autocast():
            kept[0] = estimator.estimate([forward], params, refresh)

    def logits(rows: int, readout: Any = None) -> Tensor:
        result: Tensor = model(batch(rows)[0], readout)
        return result

    def loss(rows: int, call: Callable[[Tensor], Tensor]) -> Tensor:
        inputs, targets = batch(rows)
        return F.cross_entropy(call(inputs).flatten(0, 1), targets.flatten())

    few, some, all_rows = setup.product_rows, setup.chunk_rows, setup.micro_batch
    # A second derivative goes through plain operations only: around the compiler, where there is one.
    plain: Callable[[Tensor], Tensor] = model.forward
    runs: dict[str, tuple[Run, int]] = {
        "training": (functools.partial(stepper.gradients, *batch(all_rows), index=0), all_rows),
        "step": (step, all_rows),
    }
    for noise in ("labels", "signs"):
        own = GaussNewtonBartlett(noise=noise)
        runs[noise] = (functools.partial(estimate, own, functools.partial(logits, some, deferred_logits)), some)
    runs["fold"] = (lambda: sophia.update_curvature(kept[0]), some)
    runs[OFFICIAL] = (functools.partial(_official, setup, functools.partial(logits, all_rows), params), all_rows)
    double, difference = Hutchinson(product="double_backward"), Hutchinson(product="finite_difference")
    for name, hutchinson, call in (("double backward", double, plain), ("difference", difference, model)):
        runs[name] = (functools.partial(estimate, hutchinson, functools.partial(loss, few, call)), few)
    return runs


def _refreshes(setup: Setup) -> list[tuple[str, str, int, int]]:
    """(name in the table, what was timed for it, sequences, folds)."""
    own, total = setup.curvature_rows, setup.total_rows
    shown = f"{own} sequences in {-(-own // setup.chunk_rows)} chunks"
    return [
        (f"ours, labels: {shown}", "labels", own, 1),
        (f"ours, signs: {shown}", "signs", own, 1),
        ("official: sampled labels, whole batch", OFFICIAL, total, 0),
        ("the same, half the batch", OFFICIAL, total // 2, 0),
        ("Hutchinson, double backward, whole batch", "double backward", total, 1),
        ("the same, an eighth of the batch", "double backward", total // 8, 1),
        ("Hutchinson, finite difference, whole batch", "difference", total, 1),
        ("the same, an eighth of the batch", "difference", total // 8, 1),
    ]


def _in_percent(
    setup: Setup,
    name: str,
    what: str,
    rows: int,
    folds: int,
    seconds: dict[str, list[float]],
    runs: dict[str, tuple[Run, int]],
) -> dict[str, Any]:
    factor = rows / runs[what][1]
    micro_batches = setup.total_rows / setup.micro_batch
    shares = [
        100 * (factor * refresh + folds * fold) / (CURVATURE_INTERVAL * (micro_batches * micro_batch + step))
        for refresh, fold, micro_batch, step in zip(
            seconds[what], seconds["fold"], seconds["training"], seconds["step"], strict=True
        )
    ]
    return {"name": name, "rows": rows, "timed": what, "percent": summary(shares)}


def sampling(setup: Setup, vocab: int) -> dict[str, Run]:
    """The noise of one micro-batch's predictions, over and over in the same place; the softmax beside it."""
    rows, positions = setup.micro_batch, setup.config.context
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    generator = torch.Generator(setup.device).manual_seed(0)
    logits = torch.randn(rows, positions, vocab, device=setup.device, dtype=dtype, generator=generator)
    out = torch.empty_like(logits)
    keys = row_keys(1, torch.arange(rows)).to(setup.device)

    def noise(kind: str) -> None:
        output_noise(logits, None, keys, likelihood="categorical", kind=kind, vocab_size=None, out=out)

    return {
        "softmax alone": lambda: torch.softmax(logits, -1, dtype=torch.float32),
        "labels": functools.partial(noise, "labels"),
        "signs": functools.partial(noise, "signs"),
        "torch.distributions.Categorical": functools.partial(_drawn, logits),
    }


def _official(setup: Setup, forward: Callable[[], Tensor], params: Sequence[nn.Parameter]) -> None:
    """One micro-batch of the official refresh: labels from a Categorical, the loss for them, its gradient."""
    with setup.autocast():
        logits = forward().flatten(0, 1)  # [predictions, vocab]
        labels = _drawn(logits.detach())
        loss = F.cross_entropy(logits, labels)
    torch.autograd.backward(loss)
    for p in params:
        p.grad = None


def _drawn(logits: Tensor) -> Tensor:
    law = torch.distributions.Categorical(logits=logits, validate_args=False)
    labels: Tensor = law.sample()  # type: ignore[no-untyped-call]
    return labels


def _stepper(setup: Setup) -> tuple[Stepper, Tensor]:
    model = GPT(setup.config, torch.Generator().manual_seed(0)).to(setup.device)
    if setup.compile:
        model.compile(dynamic=False)
    recipe: dict[str, Any] = {**setup.recipe, "curvature_rows": setup.curvature_rows}
    recipe["curvature_chunks"] = setup.curvature_chunks
    optimizers = Optimizers(OptimizerSettings(optimizer="sophia-g", **recipe), model, seed=0)
    optimizers.set_lr(0.0)  # the same model in all rounds
    stepper = Stepper(
        model=model,
        optimizers=optimizers,
        here=World(rank=0, size=1, device=setup.device),
        rows=range(setup.micro_batch),
        total_rows=setup.micro_batch,
        micro_batch=setup.micro_batch,
        max_grad_norm=1.0,
        seed=0,
        autocast=setup.autocast,
    )
    shape = setup.micro_batch, setup.config.context + 1
    ids = torch.randint(setup.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return stepper, ids.to(setup.device)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
