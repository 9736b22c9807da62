"""What an update of each optimizer costs: `timing.json`.

All of them are built in one process, with all the threads that torch takes by itself (as a user would train, other than
the runs of the study, which share the cores), and step in turn, round by round: whatever else the machine does slows
them alike, and ratios are taken within each round. The first rounds, with compilation in them, do not count. Operations
and memory are measured apart, each optimizer in a process of its own.
"""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sophia import machine
from sophia.distributed import World, world
from sophia.study.alone import alone
from sophia.study.evidence import same_cost
from sophia.study.measured import Cost
from sophia.study.plan import AblationCell, Cell, Plan
from sophia.study.runs import RunSpec, settings
from sophia.study.settings import Study
from sophia.study.statistics import median_interval
from sophia.study.timed_case import Case, Stepping, weigh

FILE = "timing.json"
FORMAT = 1
LEAST_ROUNDS = 6
_MOST_ROUNDS = 15
_SECONDS = 120.0  # all rounds together, where that allows the least number


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a study's timing is made."""

    data: Path
    """The prepared data."""
    out: Path
    """The study's folder."""
    processes: int = 1
    """At the same time, where memory is measured."""


def cases(study: Study, plan: Plan) -> list[Case]:
    """What is to be timed: every entry at its best settings at T, at each batch; ablations that cost something else."""
    found = []
    best: dict[str, RunSpec] = {}
    for cell in plan.cells:
        spec = _best(cell)
        if spec is not None and spec.tokens == study.race.tokens:
            found.append(Case(name=cell.optimizer, spec=spec))
            if spec.tokens_per_step == study.race.tokens_per_step:
                best[cell.optimizer] = spec
    for ablation in plan.ablations:
        spec = _best(ablation)
        entry = best.get(ablation.of)
        if spec is not None and (entry is None or not same_cost(spec.settings, entry.settings)):
            found.append(Case(name=ablation.name, spec=spec))
    # Where the baseline has only diverged, there is nothing to compare with.
    measured = {case.spec.tokens_per_step for case in found if case.name == study.race.baseline}
    return [case for case in found if case.spec.tokens_per_step in measured]


def measure(study: Study, plan: Plan, place: Place, report: Callable[[str], None] = lambda _: None) -> list[Cost]:
    """Time everything, or read what was timed before with the same settings.

    Args:
        study: The settings.
        plan: Says which settings are best.
        place: Where.
        report: Is told what goes on.

    Raises:
        ValueError: A case cannot run.
        OSError: The result cannot be written.
    """
    wanted = cases(study, plan)
    known = read(study, plan, place.out)
    if len(known) == len(wanted):
        return known
    folder = place.out / "work" / "timing"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        weights = _weights(study, wanted, place, folder, report)
        with world(study.machine.device) as here:
            costs = _rounds(study, wanted, weights, place.data, folder, here, report)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    lines = [
        {**asdict(cost), "settings": dict(cost.settings), "kind": case.spec.kind}
        for case, cost in zip(wanted, costs, strict=True)
    ]
    machine.write_json(place.out / FILE, {"format": FORMAT, "machine": machine.describe(), "costs": lines})
    return costs


def read(study: Study, plan: Plan, out: Path) -> list[Cost]:
    """What was timed before, as far as it is about the settings that are best now; in the order of `cases`.

    Raises:
        ValueError: The file is damaged.
    """
    path = out / FILE
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, and this version of sophia reads {FORMAT}")
        if not isinstance(content["machine"], dict):
            raise TypeError(f"machine is {content['machine']!r}")
        stored = {(line["optimizer"], line["kind"], line["tokens_per_step"]): _cost(line) for line in content["costs"]}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        reason = f"it has no {problem}" if isinstance(problem, KeyError) else str(problem)
        raise ValueError(f"{path} is damaged ({reason}): delete it, and it is measured again") from None
    found = []
    for case in cases(study, plan):
        cost = stored.get((case.name, case.spec.kind, case.spec.tokens_per_step))
        if cost is not None and same_cost(cost.settings, case.spec.settings):
            found.append(cost)
    return found


def _cost(line: Mapping[str, Any]) -> Cost:
    values = {name: line[name] for name in Cost.__dataclass_fields__}
    for name, value in values.items():
        numbers = value if name == "seconds" else [value]
        if name not in ("optimizer", "settings") and not all(isinstance(x, (int, float, type(None))) for x in numbers):
            raise TypeError(f"{name} is {value!r}")
    for name in ("seconds_per_step", "ratio", "ratio_low", "ratio_high", "flops_per_step"):
        if not (values[name] is not None and values[name] > 0):
            raise ValueError(f"{name} is {values[name]!r}")
    return Cost(**{**values, "settings": settings(**values["settings"]), "seconds": tuple(values["seconds"])})


def _best(cell: Cell | AblationCell) -> RunSpec | None:
    """A run at the best settings; which seed it has, costs nothing."""
    if cell.best is None:
        return None
    specs = [*cell.finals, *(trial.spec for trial in cell.trials)]
    return next((replace(spec, settings=cell.best) for spec in specs), None)


def _weights(
    study: Study, wanted: Sequence[Case], place: Place, folder: Path, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Operations and memory of each case, in the order of the cases."""
    threads = torch.get_num_threads()

    def one(number: int) -> dict[str, Any]:
        report(f"operations and memory: {wanted[number].name}")
        told: dict[str, Any] = alone(weigh, study, wanted[number], place.data, folder / f"weigh-{number}", threads)
        return told

    with ThreadPoolExecutor(place.processes) as pool:
        return list(pool.map(one, range(len(wanted))))


def _rounds(
    study: Study,
    wanted: Sequence[Case],
    weights: Sequence[Mapping[str, Any]],
    data: Path,
    folder: Path,
    here: World,
    report: Callable[[str], None],
) -> list[Cost]:
    """The costs of all cases, which run in turn."""
    going: list[Stepping] = []
    try:
        for number, case in enumerate(wanted):
            going.append(Stepping(study, case, data=data, folder=folder / f"time-{number}", here=here))
        _equal_micro_batches(wanted, going)
        for case, one in zip(wanted, going, strict=True):
            report(f"warming up: {case.name}")
            one.warm_up()
        seconds: list[list[float]] = [[] for _ in wanted]
        refreshes = [one.refreshes for one in going]
        started, rounds = time.monotonic(), 0
        while rounds < LEAST_ROUNDS or (rounds < _MOST_ROUNDS and time.monotonic() - started < _SECONDS):
            rounds += 1
            report(f"timing, round {rounds} of {LEAST_ROUNDS} to {_MOST_ROUNDS}")
            order = range(len(wanted)) if rounds % 2 else range(len(wanted) - 1, -1, -1)
            for number in order:
                seconds[number].append(going[number].round() / going[number].steps)
        made = [
            None if before is None else ((one.refreshes or 0) - before) // rounds
            for one, before in zip(going, refreshes, strict=True)
        ]
        steps = [one.steps for one in going]
    finally:
        for one in going:
            one.close()
    costs = []
    for number, case in enumerate(wanted):
        reference = seconds[_reference(study, wanted, case)]
        ratios = [own / other for own, other in zip(seconds[number], reference, strict=True)]
        low, high = median_interval(ratios)
        costs.append(
            Cost(
                optimizer=case.name,
                settings=case.spec.settings,
                tokens_per_step=case.spec.tokens_per_step,
                seconds_per_step=statistics.median(seconds[number]),
                ratio=statistics.median(ratios),
                ratio_low=low,
                ratio_high=high,
                rounds=rounds,
                steps_per_round=steps[number],
                refreshes_per_round=made[number],
                flops_per_step=weights[number]["flops_per_step"],
                peak_memory_bytes=weights[number]["peak_memory_bytes"],
                seconds=tuple(seconds[number]),
            )
        )
    return costs


def _reference(study: Study, wanted: Sequence[Case], case: Case) -> int:
    """The baseline at the case's batch."""
    return next(
        number
        for number, other in enumerate(wanted)
        if other.name == study.race.baseline and other.spec.tokens_per_step == case.spec.tokens_per_step
    )


def _equal_micro_batches(wanted: Sequence[Case], going: Sequence[Stepping]) -> None:
    """What fits all: those built first found more memory free."""
    for case, one in zip(wanted, going, strict=True):
        sizes = [
            other.session.stepper.micro_batch
            for peer, other in zip(wanted, going, strict=True)
            if peer.spec.tokens_per_step == case.spec.tokens_per_step
        ]
        one.session.stepper.micro_batch = min(sizes)
