"""What a study has found so far and what it wants next: a pure function of the study and its finished runs."""

from collections.abc import Mapping
from dataclasses import dataclass

from sophia.study.runs import FinishedRun, RunSpec, Settings
from sophia.study.settings import Study


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a search."""

    spec: RunSpec
    """What was run, or is to be."""
    loss: float | None
    """Its validation loss; None: diverged, or not run yet (see `finished`)."""
    finished: bool
    """Whether it has run."""
    why: str
    """The rule that asked for it: "grid", "edge", the name of a setting, or "refine"."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One optimizer at one budget and batch: its search there, and the runs that count."""

    optimizer: str
    """The entry's name."""
    steps: int
    """Updates of each run."""
    tokens_per_step: int
    """Predictions in an update."""
    trials: tuple[Trial, ...]
    """In the order of the search."""
    best: Settings | None
    """Settings of the lowest loss; None until the search is done, or where all diverged."""
    edges: tuple[str, ...]
    """Settings whose best value lies on the edge of what was tried, as sentences for the report."""
    finals: tuple[RunSpec, ...]
    """One run for each final seed, at the best settings; empty until the search is done."""


@dataclass(frozen=True, kw_only=True)
class AblationCell:
    """An entry with something changed."""

    name: str
    """Of the ablation."""
    of: str
    """The entry."""
    trials: tuple[Trial, ...]
    """Over learning rates, where the study asks for that."""
    best: Settings | None
    """None until it is known."""
    finals: tuple[RunSpec, ...]
    """One run for each of the study's seeds."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The state of a study."""

    cells: tuple[Cell, ...]
    """The baseline's first, then by entry; within an entry T first, then other budgets, then other batches."""
    ablations: tuple[AblationCell, ...]
    """In the order of the study file."""
    wanted: tuple[RunSpec, ...]
    """Runs that can start now, most urgent first, none of them finished."""
    steps_left: int
    """Updates until the end of the study, those of searches not yet begun estimated."""
    done: bool
    """Whether everything has run."""


def plan(study: Study, finished: Mapping[str, FinishedRun]) -> Plan:
    """What is known and wanted, from finished runs by `RunSpec.id`."""
    raise NotImplementedError
