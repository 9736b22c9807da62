"""The demo's search for settings: the same rule and the same number of trials for each optimizer.

1. A logarithmic grid of learning rates; while the best lies on its edge, the grid grows there.
2. At the best learning rate, three other values of other settings, one at a time.
3. The optimizer with fewer trials gets more learning rates, around its best one, until the numbers agree.

Every trial is a run of the demo's own length, with a schedule of its own.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from sophia import machine
from sophia.race import AdamWRecipe, RaceSettings, Recipe, SophiaGRecipe, Text, prepare_text, race, start_runs

_FACTOR = 2.0  # from one learning rate of the grid to the next
_MOST_EXTENSIONS = 4


@dataclass(frozen=True, kw_only=True)
class Search:
    """Where the search for one optimizer's settings begins."""

    recipe: Recipe
    """Everything that is not searched."""
    rates: tuple[float, ...]
    """The first grid of learning rates, ascending by a factor of 2."""
    alternatives: tuple[tuple[str, float], ...]
    """Other settings to try at the best learning rate, each with one other value."""


SEARCHES = (
    Search(
        recipe=AdamWRecipe(beta1=0.9, beta2=0.95),
        rates=(4e-3, 8e-3, 16e-3),
        alternatives=(("beta1", 0.8), ("beta2", 0.9), ("beta2", 0.99)),
    ),
    Search(
        recipe=SophiaGRecipe(beta1=0.9, gamma=0.1),
        rates=(1e-3, 2e-3, 4e-3),
        alternatives=(("beta1", 0.96), ("gamma", 0.05), ("gamma", 0.5)),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One finished run of the search."""

    recipe: Recipe
    """Its settings."""
    loss: float
    """Final validation loss; infinite where the run diverged."""
    clip_fraction: float | None
    """For Sophia: share of clipped coordinates, mean over the run."""


Runner = Callable[[Sequence[Recipe]], list[Trial]]


def search(searches: Sequence[Search], run: Runner) -> list[Trial]:
    """Follow the rule above with `run`, which makes trials of recipes. Returns all trials in their order."""
    trials: dict[Recipe, Trial] = {}

    def make(recipes: Sequence[Recipe]) -> None:
        new = [recipe for recipe in dict.fromkeys(recipes) if recipe not in trials]
        trials.update(zip(new, run(new), strict=True))

    def of(one: Search) -> list[Trial]:
        return [trial for trial in trials.values() if type(trial.recipe) is type(one.recipe)]

    make([dataclasses.replace(one.recipe, lr=lr) for one in searches for lr in one.rates])
    for _ in range(_MOST_EXTENSIONS):
        make([recipe for one in searches for recipe in _beyond_the_edge(of(one))])
    make([_replaced(best(of(one)).recipe, *change) for one in searches for change in one.alternatives])
    most = max(len(of(one)) for one in searches)
    for one in searches:
        between = _between(best(of(one)).recipe)
        while len(of(one)) < most:
            make([next(between)])
    return list(trials.values())


def _replaced(recipe: Recipe, name: str, value: float) -> Recipe:
    settings: dict[str, Any] = {name: value}
    return dataclasses.replace(recipe, **settings)


def best(trials: Sequence[Trial]) -> Trial:
    """The trial with the least loss."""
    return min(trials, key=lambda trial: trial.loss)


def _beyond_the_edge(trials: Sequence[Trial]) -> list[Recipe]:
    """The next learning rate outward, where the best one is the least or the greatest tried."""
    recipe = best(trials).recipe
    rates = sorted(trial.recipe.lr for trial in trials)
    if recipe.lr == rates[0]:
        return [dataclasses.replace(recipe, lr=recipe.lr / _FACTOR)]
    if recipe.lr == rates[-1]:
        return [dataclasses.replace(recipe, lr=recipe.lr * _FACTOR)]
    return []


def _between(recipe: Recipe) -> Iterator[Recipe]:
    """Learning rates around the recipe's, ever closer: by √2 up and down, then by the root of that, …"""
    factor = math.sqrt(_FACTOR)
    while True:
        for lr in (recipe.lr * factor, recipe.lr / factor):
            yield dataclasses.replace(recipe, lr=float(f"{lr:.3g}"))
        factor = math.sqrt(factor)


def run_trials(
    settings: RaceSettings, recipes: Sequence[Recipe], *, processes: int, done: Callable[[Trial], None]
) -> list[Trial]:
    """Make trials in parallel processes of one thread each, and call `done` as each one ends."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        futures = [pool.submit(_trial, settings, recipe) for recipe in recipes]
        for future in futures:
            future.add_done_callback(lambda finished: None if finished.exception() else done(finished.result()))
        return [future.result() for future in futures]


def _one_thread() -> None:
    torch.set_num_threads(1)


_texts: dict[RaceSettings, Text] = {}  # of a worker process, which makes many trials


def _trial(settings: RaceSettings, recipe: Recipe) -> Trial:
    if settings not in _texts:
        _texts[settings] = prepare_text(settings)
    text = _texts[settings]
    (run,) = runs = start_runs(settings, [recipe])
    for _ in race(settings, runs, text):
        pass
    clipped = run.clip_fractions
    return Trial(
        recipe=recipe,
        loss=math.inf if run.diverged or not math.isfinite(run.final_loss) else run.final_loss,
        clip_fraction=sum(clipped) / len(clipped) if clipped else None,
    )


def report(settings: RaceSettings, trials: Sequence[Trial], fingerprint: str) -> dict[str, Any]:
    """What is committed of a search."""
    return {
        "study": "demo-sweep",
        "command": "sophia demo --sweep",
        "settings": dataclasses.asdict(settings),
        "text_sha256": fingerprint,
        "machine": machine.describe(),
        "trials": [
            {
                "optimizer": trial.recipe.name,
                "settings": dataclasses.asdict(trial.recipe),
                "val_loss": trial.loss if math.isfinite(trial.loss) else None,
                "clip_fraction": trial.clip_fraction,
            }
            for trial in trials
        ],
    }


def write(settings: RaceSettings, trials: Sequence[Trial], fingerprint: str, folder: Path) -> tuple[Path, Path]:
    """Write the search as JSON and as a Markdown table; returns both paths."""
    results = folder / "benchmarks" / "results" / "demo-sweep.json"
    study = report(settings, trials, fingerprint)
    machine.write_json(results, study)
    page = folder / "docs" / "demo-sweep.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(markdown(study), encoding="utf-8")
    return results, page


_PREFACE = """\
# The demo's search for settings

Written by `sophia demo --sweep`; data in `benchmarks/results/demo-sweep.json`. One seed, a tiny model, a short run:
enough to choose the demo's settings, no verdict on the optimizers.

The same rule for both: a grid of learning rates by factors of 2 that grows while its best lies on the edge; three other
values of other settings at the best rate; then rates in between until both have as many trials.

Where the search starts comes from some thirty pilot runs, which were not kept, more of them for Sophia-G than for
AdamW. Two things in them are worth knowing. A short warm-up is bad for both: with the settings below and 5 % instead of
50 %, `sophia demo --warmup-fraction 0.05` ends at 5.12 for AdamW and 5.20 for Sophia-G (learning rates not searched
anew). And the paper's β1 = 0.96 is worse for Sophia-G here than 0.9, as the table shows: its curvature starts at zero
and is not bias-corrected, so that early in a run nearly every coordinate is clipped.
"""


def markdown(study: dict[str, Any]) -> str:
    """The page that shows what `report` returned."""
    settings, made = RaceSettings(**study["settings"]), study["machine"]
    lines = [
        _PREFACE,
        f"{settings.steps} steps of {settings.tokens_per_step} tokens, warm-up {settings.warmup_fraction:.0%}, cosine;",
        f"{made['cpu']}, torch {made['torch']}, {made['date']}.",
    ]
    for one in SEARCHES:
        trials = [trial for trial in study["trials"] if trial["optimizer"] == one.recipe.name]
        rows = sorted(trials, key=lambda trial: math.inf if trial["val_loss"] is None else trial["val_loss"])
        names = ["lr", *dict.fromkeys(name for name, _ in one.alternatives)]
        lines += ["", f"## {one.recipe.name}: {len(rows)} trials", ""]
        lines += [f"| {' | '.join(names)} | validation loss | clipped |", "|---" * (len(names) + 2) + "|"]
        for trial in rows:
            clipped = "" if trial["clip_fraction"] is None else f"{trial['clip_fraction']:.0%}"
            loss = "diverged" if trial["val_loss"] is None else f"{trial['val_loss']:.4f}"
            mark = "**" if trial is rows[0] else ""
            values = " | ".join(f"{trial['settings'][name]:g}" for name in names)
            lines.append(f"| {values} | {mark}{loss}{mark} | {clipped} |")
    return "\n".join(lines) + "\n"
