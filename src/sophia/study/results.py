"""results.json: everything that a study found, finished or not, in the one form that the report reads."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia.presets import PRESETS
from sophia.study import evidence, plain, verdict
from sophia.study.flags import flags
from sophia.study.measured import Cost
from sophia.study.plan import AblationCell, Cell, Plan, roles
from sophia.study.runs import FinishedRun
from sophia.study.settings import Entry, Study
from sophia.study.standing import Standings, final_loss, paired


@dataclass(frozen=True, kw_only=True)
class StudyContext:
    """What the results say about a study beside its settings and runs."""

    file: str
    """The study file, word for word."""
    file_sha256: str
    """Of that file."""
    committed: bool | None
    """Whether the file was in git, unchanged, when the first run under test started; None: no such run yet, or no
    repository."""
    fingerprint: str
    """Of the prepared data: tokens, tokenizer and split."""
    text: str
    """Where the text comes from."""
    text_sha256: str
    """Of the text; empty for builtin text, which has its fingerprint."""
    machine: Mapping[str, Any]
    """`machine.describe()`."""
    parameters: int
    """Numbers of the model that training adjusts."""
    vocab_size: int
    """Token ids of the data."""
    context: int
    """Tokens in a sequence."""


def build(
    study: Study,
    plan: Plan,
    finished: Mapping[str, FinishedRun],
    costs: Sequence[Cost],
    context: StudyContext,
) -> dict[str, Any]:
    """The content of results.json: plain values only; what is not known yet is None.

    Args:
        study: The settings.
        plan: What `plan.plan` says about these runs.
        finished: By `RunSpec.id`.
        costs: One for each entry and ablation that was timed, the baseline among them; may be empty.
        context: What else the results say.

    Raises:
        ValueError: Runs or timings are not comparable; the message names them.
    """
    found = evidence.check(study, plan, finished, costs)
    table = Standings(study, plan, finished, costs)
    # What has only diverged has no settings to be timed with, nor has anything where that is the baseline.
    lost = {cell.optimizer for cell in plan.cells if cell.steps * cell.tokens_per_step == study.race.tokens}
    lost -= {cell.optimizer for cell in plan.cells if cell.best is not None}
    timed = study.race.baseline in lost or all(
        table.cost(entry.name, study.race.tokens_per_step) for entry in study.optimizers if entry.name not in lost
    )
    results: dict[str, Any] = {
        "study": _study(study, context),
        "machine": _machine(context, finished),
        "baseline": study.race.baseline,
        "headline": study.race.headline or None,
        "verdict": "",
        "complete": plan.done and timed,
        "optimizers": {entry.name: _optimizer(table, entry) for entry in study.optimizers},
        "duels": _duels(table),
        "baseline_curve": [
            _point(table, cell) for cell in plan.cells if cell.optimizer == study.race.baseline and cell.finals
        ],
        "ablations": [_ablation(table, cell) for cell in plan.ablations],
        "runs": _runs(table),
        "flags": [*flags(table, context.committed), *found],
    }
    results["verdict"] = verdict.sentence(results, table.missing() if study.race.headline else "")
    return results


def _study(study: Study, context: StudyContext) -> dict[str, Any]:
    race = study.race
    return {
        "name": study.name,
        "about": study.about,
        "text": context.text,
        "text_sha256": context.text_sha256 or None,
        "fingerprint": context.fingerprint,
        "tokens": race.tokens,
        "tokens_per_step": race.tokens_per_step,
        "steps": race.tokens // race.tokens_per_step,
        "context": context.context,
        "model": _model(study, context),
        "schedule": {
            "kind": race.schedule,
            "warmup_fraction": race.warmup_fraction,
            "final_lr_fraction": race.final_lr_fraction,
            "max_grad_norm": race.max_grad_norm,
        },
        "budgets": [race.steps(share, race.tokens_per_step) * race.tokens_per_step for share in race.baseline_budgets],
        "seeds": list(race.seeds),
        "headline_seeds": list(race.paired_seeds),
        "search_seed": race.search_seed,
        "search_budget": race.search_budget,
        "trials": race.trials,
        "retrials": race.retrials,
        "factor": race.factor,
        "eval_windows": race.eval_windows,
        "file": context.file,
        "file_sha256": context.file_sha256,
        "committed": context.committed,
    }


def _model(study: Study, context: StudyContext) -> dict[str, Any]:
    shape = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(study.model).items()}
    base = PRESETS.get(study.model.model)
    if base is not None and study.model.init_from is None:
        left_open = [name for name in ("layers", "heads", "width", "attention_scale_by_layer") if shape[name] is None]
        shape |= {name: getattr(base, name) for name in left_open}
    return {**shape, "context": context.context, "parameters": context.parameters, "vocab_size": context.vocab_size}


def _machine(context: StudyContext, finished: Mapping[str, FinishedRun]) -> dict[str, Any]:
    """With what the runs themselves wrote down: one value where they agree, else all."""
    seen: dict[str, list[Any]] = {}
    for run in finished.values():
        for name, value in ({} if run.evidence is None else run.evidence.conditions).items():
            if value not in seen.setdefault(name, []):
                seen[name].append(value)
    dates = sorted({run.date for run in finished.values() if run.date})
    return {
        **context.machine,
        "conditions": {name: values[0] if len(values) == 1 else values for name, values in seen.items()},
        "dates": [dates[0], dates[-1]] if dates else None,
    }


def _optimizer(table: Standings, entry: Entry) -> dict[str, Any]:
    race = table.study.race
    cell, reference = table.cell(entry.name), table.cell(race.baseline)
    standing = table.standing(cell, reference)
    searches = [one for one in table.plan.cells if one.optimizer == entry.name]
    return {
        "optimizer": entry.optimizer,
        "hook": entry.hook or None,
        "best": plain.settings(None if cell is None else cell.best),
        "final_loss": plain.loss(final_loss(table.losses(cell))),
        "speedup_tokens": plain.estimate(standing.tokens),
        "speedup_seconds": plain.estimate(standing.seconds),
        "speedup_flops": plain.estimate(standing.flops),
        "claim": standing.claim,
        "claim_seconds": standing.claim_seconds,
        "cost": plain.cost(table.cost(entry.name, race.tokens_per_step)),
        "trials": 0 if cell is None else sum(trial.finished for trial in cell.trials),
        "searches": [_search(one) for one in searches],
        "paper_test": _paper_test(table, entry.name),
        "best_batch": _best_batch(table, entry.name),
        "clip_fraction": _clip_fraction(table, cell),
    }


def _duels(table: Standings) -> list[dict[str, Any]]:
    """The headline against each of the others but the baseline."""
    race = table.study.race
    if not race.headline or race.headline == race.baseline:
        return []
    found = []
    for entry in table.study.optimizers:
        if entry.name not in (race.headline, race.baseline):
            standing = table.duel(table.cell(race.headline), table.cell(entry.name))
            found.append(
                {
                    "optimizer": entry.name,
                    "speedup_tokens": plain.estimate(standing.tokens),
                    "speedup_seconds": plain.estimate(standing.seconds),
                    "speedup_flops": plain.estimate(standing.flops),
                    "claim": standing.claim,
                    "claim_seconds": standing.claim_seconds,
                }
            )
    return found


def _search(cell: Cell) -> dict[str, Any]:
    return {
        "steps": cell.steps,
        "tokens": cell.steps * cell.tokens_per_step,
        "tokens_per_step": cell.tokens_per_step,
        "edges": list(cell.edges),
        "trials": [plain.trial(trial) for trial in cell.trials if trial.finished],
    }


def _paper_test(table: Standings, name: str) -> dict[str, Any] | None:
    """The headline at half the budget against the baseline at the whole."""
    race = table.study.race
    half = table.cell(name, race.tokens // 2)
    if name != race.headline or half is None or not table.losses(half):
        return None
    losses = table.losses(half)
    return {
        "tokens": half.steps * half.tokens_per_step,
        "loss": plain.loss(final_loss(losses)),
        "difference": plain.difference(paired(losses, table.losses(table.cell(race.baseline)))),
    }


def _best_batch(table: Standings, name: str) -> dict[str, Any] | None:
    race = table.study.race
    if not race.other_batches or name not in (race.baseline, race.headline):
        return None
    cell, reference = table.best_batch(name), table.best_batch(race.baseline)
    if cell is None or cell.best is None or reference is None:
        return None
    standing = table.standing(cell, reference)
    return {
        "tokens_per_step": cell.tokens_per_step,
        "best": plain.settings(cell.best),
        "final_loss": plain.loss(final_loss(table.losses(cell))),
        "speedup_tokens": plain.estimate(standing.tokens),
        "speedup_seconds": plain.estimate(standing.seconds),
        "claim": standing.claim,
    }


def _clip_fraction(table: Standings, cell: Cell | None) -> list[dict[str, Any]] | None:
    """The mean over the final runs, by step."""
    by_step: dict[int, list[float]] = {}
    for spec in () if cell is None else cell.finals:
        for point in table.finished[spec.id].curve if spec.id in table.finished else ():
            if point.clip_fraction is not None:
                by_step.setdefault(point.step, []).append(point.clip_fraction)
    return [{"step": step, "mean": sum(seen) / len(seen)} for step, seen in sorted(by_step.items())] or None


def _point(table: Standings, cell: Cell) -> dict[str, Any]:
    return {
        "steps": cell.steps,
        "tokens": cell.steps * cell.tokens_per_step,
        "tokens_per_step": cell.tokens_per_step,
        "lr": None if cell.best is None else dict(cell.best)["lr"],
        "loss": plain.loss(final_loss(table.losses(cell))),
    }


def _ablation(table: Standings, cell: AblationCell) -> dict[str, Any]:
    wanted = next(one for one in table.study.ablations if one.name == cell.name)
    losses, size = table.losses(cell), table.study.race.tokens_per_step
    cost = None if cell.best is None else table.cost_with(cell.best, cell.name, cell.of, tokens_per_step=size)
    return {
        "name": cell.name,
        "of": cell.of,
        "settings": plain.settings(wanted.settings),
        "best": plain.settings(cell.best),
        "final_loss": plain.loss(final_loss(losses)),
        "difference": plain.difference(paired(losses, table.losses(table.cell(cell.of)))),
        "searched": bool(wanted.lr_factors),
        "trials": [plain.trial(trial) for trial in cell.trials if trial.finished],
        "cost": plain.cost(cost),
    }


def _runs(table: Standings) -> list[dict[str, Any]]:
    known = roles(table.plan)
    owners: dict[str, str] = {}
    for one in table.plan.ablations:
        owners |= dict.fromkeys([spec.id for spec in (*(trial.spec for trial in one.trials), *one.finals)], one.name)
    return [
        _run(table, run, role, owners.get(run.spec.id) if role == "ablation" else None)
        for run in table.finished.values()
        for role in [known.get(run.spec.id, "other")]
    ]


def _run(table: Standings, run: FinishedRun, role: str, ablation: str | None) -> dict[str, Any]:
    spec = run.spec
    names = [spec.optimizer] if ablation is None else [ablation, spec.optimizer]
    cost = table.cost_with(spec.settings, *names, tokens_per_step=spec.tokens_per_step)
    return {
        "id": spec.id,
        "optimizer": spec.optimizer,
        "ablation": ablation,
        "settings": plain.settings(spec.settings),
        "seed": spec.seed,
        "tokens": spec.tokens,
        "steps": spec.steps,
        "tokens_per_step": spec.tokens_per_step,
        "seconds": None if cost is None else cost.seconds_per_step * spec.steps,
        "seconds_as_run": run.seconds,
        "flops": None if cost is None else cost.flops_per_step * spec.steps,
        "val_loss": run.val_loss,
        "role": role,
        "date": run.date,
        "curve": [dataclasses.asdict(point) for point in run.curve],
    }
