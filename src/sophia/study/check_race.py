"""What cannot be equal for all: text, model, budgets, batches, seeds and the rule of the search.

Each check ends in one line with the value, the reason and the remedy.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from sophia.config import ModelSettings, ScheduleSettings, TrainSettings, check_positive
from sophia.model import GPTConfig
from sophia.resolve import factor, resolve_optimizer
from sophia.study.settings import DataSettings, RaceSettings

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GRID = 3
# Learning rates are rounded to three digits: closer ones would be the same.
_LEAST_FACTOR = 1.1
_SEEDS = 2**63

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "tokens": (lambda x: x >= 1, "at least 1"),
    "tokens_per_step": (lambda x: x >= 1, "at least 1"),
    "trials": (
        lambda x: x == 0 or x >= _GRID,
        f"at least {_GRID}, the learning rates that a search begins with, or 0 for no search at all",
    ),
    "retrials": (lambda x: x >= 0, "at least 1, or 0 for no search at other budgets and batches"),
    "factor": (lambda x: _LEAST_FACTOR <= x < math.inf, f"at least {_LEAST_FACTOR}, since rates have three digits"),
    "warmup_fraction": (lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "final_lr_fraction": (lambda x: 0 <= x <= 1, "between 0 and 1"),
    "max_grad_norm": (lambda x: 0 <= x < math.inf, "finite and above 0, or 0 for any gradient"),
    "evaluations": (lambda x: x >= 1, "at least 1"),
    "eval_windows": (lambda x: x >= 1, "at least 1"),
    "search_seed": (lambda x: 0 <= x < _SEEDS, "at least 0 and below 2**63"),
}


def race(asked: RaceSettings, model: ModelSettings) -> None:
    """Refuse budgets, batches, seeds and rules that cannot be run or not be judged."""
    for name, (inside, where) in _RANGES.items():
        value = getattr(asked, name)
        if not inside(value):
            raise ValueError(f"race.{name} is {value}; it must be {where}")
    _batches(asked, model)
    _budgets(asked)
    _seeds(asked)
    for budget in (*asked.baseline_budgets, *asked.headline_budgets, asked.search_budget):
        for batch in asked.batches:
            _schedule(asked, asked.steps(budget, batch), budget, batch)


def _batches(asked: RaceSettings, model: ModelSettings) -> None:
    context = _context(model)
    twice("race.other_batches", asked.batches)
    for batch in asked.batches:
        if batch < 1 or batch % context:
            near = max(1, round(batch / context)) * context
            raise ValueError(
                f"race: tokens_per_step {batch} is not a multiple of the context {context}: choose for example {near}"
            )


def _context(model: ModelSettings) -> int:
    """Of the model; whatever else is wrong with its shape is refused, too."""
    check_positive(model, "layers", "heads", "width", "context")
    shape = resolve_optimizer(TrainSettings(model=model)).model
    assert shape.context is not None
    assert shape.layers is not None
    assert shape.heads is not None
    assert shape.width is not None
    vocab_size = 1  # of the data, which is not opened yet
    GPTConfig(
        vocab_size=vocab_size,
        context=shape.context,
        layers=shape.layers,
        heads=shape.heads,
        width=shape.width,
        dropout=shape.dropout,
    )
    return shape.context


def _budgets(asked: RaceSettings) -> None:
    for name in ("baseline_budgets", "headline_budgets"):
        budgets = getattr(asked, name)
        twice(f"race.{name}", budgets)
        for budget in budgets:
            if not 0 < budget < math.inf:
                raise ValueError(f"race.{name} holds {budget}; a budget is a finite number of T, above 0")
        if 1.0 not in budgets:
            raise ValueError(f"race.{name} is {list(budgets)} without 1.0: the budget T is where all are compared")
    if not 0 < asked.search_budget <= 1:
        raise ValueError(f"race.search_budget is {asked.search_budget}; it must be above 0 and at most 1, which is T")
    budgets = tuple(dict.fromkeys((*asked.baseline_budgets, *asked.headline_budgets, asked.search_budget)))
    exact = {(budget, batch): asked.exact_steps(budget, batch) for budget in budgets for batch in asked.batches}
    multiple = math.lcm(*((steps / asked.tokens).denominator for steps in exact.values()))
    fitting = max(1, round(asked.tokens / multiple)) * multiple
    for (budget, batch), steps in exact.items():
        if steps.denominator == 1:
            continue
        reason = (
            f"smaller than a step of {batch} tokens" if steps < 1 else f"no whole number of steps of {batch} tokens"
        )
        raise ValueError(
            f"race.tokens is {asked.tokens}: the budget of {budget:g} of it is {reason}; the nearest that fits all "
            f"budgets and batches is {fitting}"
        )


def _seeds(asked: RaceSettings) -> None:
    if not asked.seeds:
        raise ValueError("race.seeds is empty; give at least one, better three")
    for name in ("seeds", "headline_seeds"):
        seeds = getattr(asked, name)
        twice(f"race.{name}", seeds)
        for seed in seeds:
            if not 0 <= seed < _SEEDS:
                raise ValueError(f"race.{name} holds {seed}; a seed is at least 0 and below 2**63")
            if seed == asked.search_seed:
                raise ValueError(
                    f"race.{name} holds {seed}, the search_seed: what was chosen by a seed's luck is not judged by it; "
                    "take another"
                )
    missing = [seed for seed in asked.seeds if seed not in asked.headline_seeds]
    if asked.headline_seeds and missing:
        raise ValueError(
            f"race.headline_seeds is {list(asked.headline_seeds)} without {missing[0]} of race.seeds: add it, the "
            "headline pair runs the seeds of all"
        )


def _schedule(asked: RaceSettings, steps: int, budget: float, batch: int) -> None:
    where = f"race: a run of {budget:g} T has {steps} steps of {batch} tokens"
    if asked.evaluations > steps:
        raise ValueError(f"{where}, fewer than its {asked.evaluations} evaluations: lower race.evaluations")
    plan = ScheduleSettings(
        steps=steps,
        schedule=asked.schedule,
        warmup_steps=round(asked.warmup_fraction * steps),
        final_lr_fraction=asked.final_lr_fraction,
    )
    try:
        factor(TrainSettings(schedule=plan), 0)
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from None


def data(asked: DataSettings) -> None:
    """Refuse text that nobody can find again."""
    if asked.folder is None:
        return
    if not asked.text:
        raise ValueError("data: no text: say where the text in the folder comes from, and under which licence")
    if not asked.sha256:
        raise ValueError("data: no sha256: give that of the text, so that others can tell whether theirs is the same")
    if not _SHA256.fullmatch(asked.sha256):
        raise ValueError(f"data.sha256 is {asked.sha256!r}; it must be 64 hexadecimal digits, in lower case")


def twice(where: str, values: Iterable[Any]) -> None:
    """Refuse a value that stands twice in a list."""
    seen: list[Any] = []
    for value in values:
        if value in seen:
            raise ValueError(f"{where} holds {value!r} twice: leave one out")
        seen.append(value)
