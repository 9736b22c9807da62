"""Whether runs may be compared at all: the judge reads what each wrote down and refuses or flags what is unequal.

What makes a comparison void raises; what a reader must know comes back as flags.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from sophia.meaning import estimates_curvature
from sophia.study.measured import Cost
from sophia.study.plan import AblationCell, Cell, Plan
from sophia.study.runs import Evidence, FinishedRun, RunSpec, Settings
from sophia.study.settings import Study

# What all runs must share, as against what only moves roundings.
_CONDITIONS = ("device", "precision", "compile")
_TELLING = ("torch", "sophia", "threads")
# An estimate or an update that is not finite is left out, by right; so many estimates in a hundred may be lost so, or
# one of many: where it is the same whenever the run is made again, a refusal would be the end of the study.
_REFUSED_PERCENT = 2
_MANY = 10
# Optimizers whose own work is element-wise, which does not count: beside these, curvature must show in the operations.
_ELEMENT_WISE = ("adamw", "nadamw", "lion", "signum")
# Settings that change what an update does to the numbers, not what it costs.
_FREE_OF_COST = frozenset(
    {
        "lr",
        "beta1",
        "beta2",
        "weight_decay",
        "decay_by_name",
        "lr_by_name",
        "gamma",
        "clip_target",
        "eps",
        "max_grad_norm",
    }
)
_DEFAULT_INTERVAL = 10


def check(study: Study, plan: Plan, finished: Mapping[str, FinishedRun], costs: Sequence[Cost]) -> list[str]:
    """Compare the evidence of all runs that the plan counts, and of the timings.

    Returns:
        What the reader must know, a sentence each.

    Raises:
        ValueError: The comparison would be void; the runs, the value, the reason and the remedy are named.
    """
    runs = [finished[spec.id] for spec in planned(plan) if spec.id in finished]
    whole = [(run, run.evidence) for run in runs if run.evidence is not None]
    for run in runs:
        _check_end(run)
        _check_evidence(run)
    for run, evidence in whole:
        _check_schedule(study, run, evidence)
    _check_equal(whole)
    flags = _check_refreshes(study, whole)
    flags += _environments(whole)
    for cost in costs:
        _check_cost(study, plan, cost, costs)
    return flags


def planned(plan: Plan) -> list[RunSpec]:
    """Every run that the plan knows, searches first, once each."""
    cells: list[Cell | AblationCell] = [*plan.cells, *plan.ablations]
    specs = [trial.spec for cell in cells for trial in cell.trials]
    specs += [spec for cell in cells for spec in cell.finals]
    return list({spec.id: spec for spec in specs}.values())


def named(spec: RunSpec) -> str:
    """A run as messages call it."""
    return f"{spec.optimizer}, seed {spec.seed}, {spec.steps} steps ({spec.id})"


def same_cost(one: Settings, other: Settings) -> bool:
    """Whether an update with these settings takes the time of one with those."""
    return _of_cost(one) == _of_cost(other)


def curvature_interval(settings: Settings) -> int:
    """Steps from one estimate to the next."""
    return int(str(dict(settings).get("curvature_interval", _DEFAULT_INTERVAL)))


def _of_cost(settings: Settings) -> dict[str, Any]:
    kept = {name: value for name, value in settings if name not in _FREE_OF_COST}
    if dict(settings).get("gamma") == "auto":
        kept["gamma"] = "auto"  # counts the clipped coordinates
    return kept


def _check_end(run: FinishedRun) -> None:
    """The loss of a run is that of its last step, where its own schedule ends."""
    if run.val_loss is None:
        return
    last = run.curve[-1] if run.curve else None
    if last is None or last.step != run.spec.steps:
        reached = "nothing" if last is None else f"step {last.step}"
        raise ValueError(
            f"{named(run.spec)}: its curve ends at {reached}, but a loss counts at the last of {run.spec.steps} steps, "
            f"where its schedule ends: {_again(run)}"
        )
    if last.val_loss is None or not math.isclose(last.val_loss, run.val_loss, rel_tol=1e-9):
        raise ValueError(
            f"{named(run.spec)}: its loss {run.val_loss} is not the {last.val_loss} at the end of its curve: "
            f"{_again(run)}"
        )


def _check_evidence(run: FinishedRun) -> None:
    if run.val_loss is not None and run.evidence is None:
        raise ValueError(
            f"{named(run.spec)}: it has a loss, but nothing says what it saw, so it cannot be compared: {_again(run)}"
        )


def _check_schedule(study: Study, run: FinishedRun, evidence: Evidence) -> None:
    wanted = 1.0 if study.race.schedule == "constant" else study.race.final_lr_fraction
    if not math.isclose(evidence.last_lr_factor, wanted, rel_tol=1e-4, abs_tol=1e-6):
        raise ValueError(
            f"{named(run.spec)}: its last learning rate was {evidence.last_lr_factor:.4g} of the peak instead of "
            f"{wanted:g}, so it is a point of another schedule: {_again(run)}"
        )


def _again(run: FinishedRun) -> str:
    return f"remove the line with {run.spec.id} from runs.jsonl, and the run is made again"


def _check_equal(whole: Sequence[tuple[FinishedRun, Evidence]]) -> None:
    """Runs that differ in the optimizer alone must have seen the same."""

    def agree(
        what: str, key: Callable[[RunSpec], Hashable], value: Callable[[Evidence], Any], shared: str, why: str
    ) -> None:
        first: dict[Hashable, tuple[FinishedRun, Any]] = {}
        for run, evidence in whole:
            other, theirs = first.setdefault(key(run.spec), (run, value(evidence)))
            if theirs != value(evidence):
                raise ValueError(
                    f"{named(run.spec)} and {named(other.spec)} have different {what}"
                    f"{_told(value(evidence), theirs)}, though {shared}: {why}; remove the line of the wrong one "
                    "from runs.jsonl, or start a new --out"
                )

    agree("initial weights", lambda s: s.seed, lambda e: e.weights, "they share a seed", "luck would decide")
    agree(
        "training batches",
        lambda s: (s.seed, s.tokens_per_step, s.steps),
        lambda e: e.batches,
        "they share seed, batch size and budget",
        "they learned from other text or in another order",
    )
    agree(
        "validation windows", lambda _: None, lambda e: e.validation, "all are measured on the same", "losses differ so"
    )
    for name in _CONDITIONS:
        agree(
            f"conditions: {name}",
            lambda _: None,
            lambda e, name=name: e.conditions.get(name),  # type: ignore[misc]
            "all must share it",
            "it changes what is learned",
        )


def _told(one: Any, other: Any) -> str:
    """Values that a person can read; digests say nothing."""
    digests = all(isinstance(value, str) and len(value) == 64 for value in (one, other))
    return "" if digests else f" ({one} and {other})"


def _check_refreshes(study: Study, whole: Sequence[tuple[FinishedRun, Evidence]]) -> list[str]:
    kinds = kind_of(study)
    lost: dict[str, list[str]] = {}
    for run, evidence in whole:
        kind = (run.spec.kind or kinds.get(run.spec.optimizer, "")).partition("+")[0]
        if not estimates_curvature(kind, dict(run.spec.settings)):
            continue
        interval = curvature_interval(run.spec.settings)
        wanted, found = math.ceil(run.spec.steps / interval), evidence.refreshes or 0
        missing = wanted - found
        most = max(_REFUSED_PERCENT * wanted / 100, 1 if wanted >= _MANY else 0)
        if not 0 <= missing <= most:
            raise ValueError(
                f"{named(run.spec)}: {found} curvature estimates in {run.spec.steps} steps, where an interval of "
                f"{interval} makes {wanted}: without them it is another optimizer; {_again(run)}"
            )
        if missing:
            lost.setdefault(run.spec.optimizer, []).append(f"{missing} of {wanted} ({run.spec.id})")
    return [
        f"{name}: curvature estimates that were not finite were left out: {', '.join(counts)}"
        for name, counts in lost.items()
    ]


def _environments(whole: Sequence[tuple[FinishedRun, Evidence]]) -> list[str]:
    flags = []
    for name in _TELLING:
        values = _ordered(str(evidence.conditions.get(name)) for _, evidence in whole)
        if len(values) > 1:
            flags.append(f"the runs were made with several values of {name}: {', '.join(values)}")
    return flags


def _ordered(values: Iterable[str]) -> list[str]:
    return sorted(set(values))


def kind_of(study: Study) -> dict[str, str]:
    """The optimizer behind each name of an entry or ablation."""
    kinds = {entry.name: entry.optimizer for entry in study.optimizers}
    return kinds | {one.name: kinds[one.of] for one in study.ablations if one.of in kinds}


def _check_cost(study: Study, plan: Plan, cost: Cost, costs: Sequence[Cost]) -> None:
    """A timing must be of the settings that are judged, with all their curvature in it."""
    best = timed_settings(study, plan, cost)
    again = "delete timing.json and measure again"
    if best is not None and not same_cost(best, cost.settings):
        raise ValueError(
            f"the timing of {cost.optimizer} was made with {plain(cost.settings)}, but its best settings are "
            f"{plain(best)}: {again}"
        )
    if not estimates_curvature(kind_of(study).get(cost.optimizer, ""), dict(cost.settings)):
        return
    interval = curvature_interval(cost.settings)
    wanted, found = cost.steps_per_round / interval, cost.refreshes_per_round or 0
    if found < wanted:
        raise ValueError(
            f"the timing of {cost.optimizer} holds {found} curvature estimates in {cost.steps_per_round} steps, where "
            f"an interval of {interval} makes {wanted:g}: its cost would be forgotten; {again}"
        )
    baseline = study.race.baseline
    reference = None
    if study.entry(baseline).kind in _ELEMENT_WISE:
        reference = next(
            (c for c in costs if (c.optimizer, c.tokens_per_step) == (baseline, cost.tokens_per_step)), None
        )
    if reference is not None and cost.flops_per_step <= reference.flops_per_step:
        raise ValueError(
            f"the timing of {cost.optimizer} counts {cost.flops_per_step:.4g} operations a step, no more than "
            f"{reference.flops_per_step:.4g} of {baseline}: curvature is not in it; {again}"
        )


def timed_settings(study: Study, plan: Plan, cost: Cost) -> Settings | None:
    """The best settings of what was timed, where they are known."""
    for cell in plan.cells:
        at = (cell.optimizer, cell.tokens_per_step, cell.steps * cell.tokens_per_step)
        if at == (cost.optimizer, cost.tokens_per_step, study.race.tokens):
            return cell.best
    if cost.tokens_per_step != study.race.tokens_per_step:
        return None
    return next((cell.best for cell in plan.ablations if cell.name == cost.optimizer), None)


def plain(settings: Settings) -> str:
    """Settings on one line."""
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings)
