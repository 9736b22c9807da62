"""What a study has found so far and what it wants next: a pure function of the study and its finished runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sophia.study.layout import ablation_slot, best_batch_slots, entry_slots
from sophia.study.runs import FinishedRun, RunSpec, Settings
from sophia.study.settings import Ablation, Study
from sophia.study.slot import Slot
from sophia.study.slot import Trial as Trial

Role = Literal["search", "final", "ablation", "other"]


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
    edges: tuple[str, ...] = ()
    """As of a cell."""


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
    tokens_left: int = 0
    """Predictions of those updates: steadier for an estimate of time where batches differ."""


def plan(study: Study, finished: Mapping[str, FinishedRun]) -> Plan:
    """What is known and wanted, from finished runs by `RunSpec.id`."""
    race = study.race
    baseline = study.entry(race.baseline)
    ranks = {one.name: number for number, one in enumerate(study.optimizers)}
    first = entry_slots(study, baseline, finished)
    others = [slot for one in study.optimizers if one is not baseline for slot in entry_slots(study, one, finished)]
    batch = best_batch(study, _cells(first), finished, race.baseline)
    extra = best_batch_slots(study, first, batch, finished)
    slots = [*first, *extra, *others]
    ablations = [ablation_slot(study, one, slots, finished) for one in study.ablations]
    found = tuple(_ablation_cell(one, slot) for one, slot in zip(study.ablations, ablations, strict=True))

    urgent: list[tuple[tuple[int, ...], RunSpec]] = []
    for slot in first:
        urgent += slot.wanted(search=(0,) if slot.main else (1, -slot.place.steps), finals=(2,))
    # Nothing can be measured against a baseline that always diverges, and its entry can change in a new study only.
    lost = any(slot.main and slot.searched and slot.best is None for slot in first)
    if lost:
        others, extra, ablations = [], [], []
    if all(slot.searched for slot in first):
        for slot in others:
            rank = ranks[slot.place.name]
            if slot.main:
                urgent += slot.wanted(search=(3,), finals=(4,), rank=rank)
            elif slot.place.tokens_per_step == race.tokens_per_step:
                urgent += slot.wanted(search=(5, -slot.place.steps), finals=(6,))
            else:
                urgent += slot.wanted(search=(7, -slot.place.steps), finals=(8,))
        for slot in extra:
            urgent += slot.wanted(search=(7, -slot.place.steps), finals=(8,))
        for rank, slot in enumerate(ablations):
            urgent += slot.wanted(search=(9,), finals=(10,), rank=rank)
    # Entry and ablation, or two ablations, may want the same run.
    wanted = {spec.id: spec for _, spec in sorted(urgent, key=lambda one: one[0])}
    left = [(slot.steps_left, slot.place) for slot in (*first, *extra, *others, *ablations)]
    return Plan(
        cells=_cells(slots),
        ablations=found,
        wanted=tuple(wanted.values()),
        steps_left=sum(steps for steps, _ in left),
        done=not wanted,
        tokens_left=sum(steps * place.tokens_per_step for steps, place in left),
    )


def roles(plan: Plan) -> dict[str, Role]:
    """What each run is for, by its id: one that counts and was tried, too, counts."""
    found: dict[str, Role] = {}
    for one in plan.ablations:
        found |= dict.fromkeys([spec.id for spec in (*(trial.spec for trial in one.trials), *one.finals)], "ablation")
    for cell in plan.cells:
        found |= dict.fromkeys([trial.spec.id for trial in cell.trials], "search")
    for cell in plan.cells:
        found |= dict.fromkeys([spec.id for spec in cell.finals], "final")
    return found


def role(plan: Plan, id: str) -> Role:
    """What a run is for; "other" where the study no longer asks for it."""
    return roles(plan).get(id, "other")


def best_batch(study: Study, cells: Sequence[Cell], finished: Mapping[str, FinishedRun], name: str) -> int | None:
    """The tokens_per_step at which an entry's final runs at budget T end lowest, on the average over seeds.

    Args:
        study: Which batches there are.
        cells: Those of the plan.
        finished: By `RunSpec.id`.
        name: The entry.

    Returns:
        None where a final run is missing. The study's own batch where others are no better.
    """
    race = study.race
    means: dict[int, float] = {}
    for batch in race.batches:
        place = (name, race.steps(1.0, batch), batch)
        cell = next((c for c in cells if (c.optimizer, c.steps, c.tokens_per_step) == place), None)
        if cell is None or any(not trial.finished for trial in cell.trials):
            return None
        if any(spec.id not in finished for spec in cell.finals):
            return None
        losses = [finished[spec.id].score for spec in cell.finals]
        means[batch] = math.fsum(losses) / len(losses) if losses else math.inf
    return min(means, key=lambda batch: means[batch])


def _cells(slots: Sequence[Slot]) -> tuple[Cell, ...]:
    """Of those that have begun, or could."""
    return tuple(
        Cell(
            optimizer=slot.place.name,
            steps=slot.place.steps,
            tokens_per_step=slot.place.tokens_per_step,
            trials=slot.trials,
            best=slot.best,
            edges=slot.found.edges,
            finals=slot.finals,
        )
        for slot in slots
        if slot.found is not None
    )


def _ablation_cell(ablation: Ablation, slot: Slot) -> AblationCell:
    return AblationCell(
        name=ablation.name,
        of=ablation.of,
        trials=slot.trials,
        best=slot.best,
        finals=slot.finals,
        edges=() if slot.found is None else slot.found.edges,
    )
