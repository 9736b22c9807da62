"""What a study runs and what comes back: plain values, which every other room of the judge passes on."""

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Value = str | int | float | bool | tuple[str, ...]
Settings = tuple[tuple[str, Value], ...]
"""Fields of `OptimizerSettings` without the optimizer itself, sorted by name: hashable, and equal when they are."""


def settings(**values: Value | list[str]) -> Settings:
    """Settings in their one order; lists, which is what JSON makes of tuples, become tuples again."""
    return tuple(sorted((name, tuple(value) if isinstance(value, list) else value) for name, value in values.items()))


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One training run: an optimizer's settings, a batch, a budget with its own full schedule, a seed."""

    optimizer: str
    """The entry's name in the study."""
    settings: Settings
    """Everything about the optimizer that the study file or the search decided, `lr` among it."""
    tokens_per_step: int
    """Predictions in an update."""
    steps: int
    """Updates: the schedule is as long as the run."""
    seed: int
    """Of initial weights, data order and curvature noise."""
    kind: str = ""
    """What the entry's name stands for: its optimizer, with its hook behind a plus sign. A study that gives the name to
    another optimizer asks for other runs."""

    @property
    def tokens(self) -> int:
        """Predictions that the run learns from."""
        return self.steps * self.tokens_per_step

    @cached_property
    def id(self) -> str:
        """Twelve hexadecimal digits that name this run: the same wants never run twice."""
        content = [self.settings, self.tokens_per_step, self.steps, self.seed, self.optimizer, self.kind]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation on the way."""

    step: int
    """Updates done."""
    tokens: int
    """Predictions learned from."""
    val_loss: float | None
    """Nats a token on the validation windows; None where it was no number."""
    loss: float | None = None
    """Training loss near that step."""
    clip_fraction: float | None = None
    """Sophia: share of the coordinates clipped near that step."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a run saw, written down by the run itself, so that the judge can tell unequal runs apart."""

    weights: str
    """Digest of the initial weights."""
    batches: str
    """Digest of the first, the middle and the last training batch (ids and targets) in order."""
    validation: str
    """Digest of all validation windows."""
    last_lr_factor: float
    """Learning rate of the last update as a fraction of the peak."""
    refreshes: int | None = None
    """Curvature estimates folded in; None where the optimizer has none."""
    conditions: dict[str, Any] = field(default_factory=dict)
    """device, precision, compile, threads, torch, sophia: what else must be equal to be compared."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A run that came to its end, or left the numbers."""

    spec: RunSpec
    """What was asked for."""
    val_loss: float | None
    """At the end; None for a run that diverged."""
    curve: tuple[Point, ...]
    """From before the first update to after the last."""
    seconds: float
    """What training took, with whatever else the machine did: comparisons use `timing`."""
    evidence: Evidence | None
    """None for a run that diverged before its end."""
    date: str = ""
    """Day of its end, UTC."""

    @property
    def score(self) -> float:
        """The loss to rank by: infinite for a run that diverged."""
        return math.inf if self.val_loss is None else self.val_loss
