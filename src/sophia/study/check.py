"""Which optimizers cannot race: each check ends in one line with the value, the reason and the remedy."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sophia.config import OPTIMIZERS, BatchSettings, ModelSettings, OptimizerSettings, TrainSettings, nearest
from sophia.meaning import check_name
from sophia.presets import preset
from sophia.resolve import resolve_optimizer
from sophia.study.check_race import twice
from sophia.study.runs import Value, settings
from sophia.study.settings import Ablation, Entry, RaceSettings, Study

SETTINGS = tuple(
    one.name for one in dataclasses.fields(OptimizerSettings) if one.name not in ("optimizer", "lr", "hook")
)
"""What a study may set of an optimizer, or search."""

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_NAME = re.compile(r"\w[\w .-]*")


def optimizer(name: str, where: str) -> None:
    """Refuse an optimizer that is neither known to sophia train nor an import path."""
    if name not in OPTIMIZERS and not _IMPORT_PATH.fullmatch(name):
        raise ValueError(
            f"{where}: unknown optimizer {name!r}{nearest(name, OPTIMIZERS)}: there are {', '.join(OPTIMIZERS)}, and "
            "package.module:Class of a torch.optim.Optimizer"
        )


def completed(entry: Entry, race: RaceSettings, model: ModelSettings) -> Entry:
    """The entry with its recipe written out, so that its runs carry all that the recipe decides.

    So are settings that are searched, which start from what sophia train would take.

    Raises:
        ValueError: A setting has no meaning for the optimizer, or a value is out of its range.
    """
    where = f"optimizer {entry.name}"
    if entry.hook and not _IMPORT_PATH.fullmatch(entry.hook):
        raise ValueError(f"{where}: hook is {entry.hook!r}; it must be package.module:function")
    own = dict(entry.settings)
    searched = dict(entry.search)
    for name in [*own, *searched]:
        _refuse_meaningless(name, entry, where)
    plain = refuse(entry, race, model, {}, where)
    recipe = preset(model.model).recipes.get(entry.optimizer, {})
    for name in (*recipe, *searched):
        value = getattr(plain, name)
        if name != "lr" and value is not None:
            own.setdefault(name, value)
    entry = replace(entry, settings=settings(**own))
    for name, values in searched.items():
        twice(f"{where}: search.{name}", values)
        if not set(values) - {own.get(name)}:
            raise ValueError(f"{where}: search.{name} holds nothing but {values[0]!r}, which it is: add other values")
        for value in values:
            refuse(entry, race, model, {name: value}, f"{where}: search")
    return entry


def _refuse_meaningless(name: str, entry: Entry, where: str) -> None:
    try:
        check_name(name, entry.optimizer)
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from None


def refuse(
    entry: Entry, race: RaceSettings, model: ModelSettings, changes: dict[str, Value], where: str
) -> OptimizerSettings:
    """Refuse what sophia train would refuse of an entry with some settings changed.

    Returns:
        The settings with nothing left open, at the common batch.

    Raises:
        ValueError: A setting has no meaning for the optimizer, or a value is out of its range.
    """
    values: dict[str, Any] = {"lr": entry.lr, **dict(entry.settings), **changes}
    if entry.hook:
        values["hook"] = entry.hook
    chosen = OptimizerSettings(optimizer=entry.optimizer, **values)
    paired = entry.name in (race.baseline, race.headline)
    batches = [BatchSettings(tokens_per_step=size) for size in (race.batches if paired else (race.tokens_per_step,))]
    try:
        first, *_ = [resolve_optimizer(TrainSettings(model=model, optimizer=chosen, batch=one)) for one in batches]
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from None
    return first.optimizer


def entries(found: Sequence[Entry], race: RaceSettings) -> None:
    """Refuse a race without runners, or with two of one name."""
    if not found:
        raise ValueError("no optimizer: write [[optimizer]] with optimizer and lr below it, once for each")
    names = [one.name for one in found]
    twice("optimizer: name", names)
    for name in names:
        _named(name, "optimizer")
    if race.baseline not in names:
        raise ValueError(
            f"race.baseline is {race.baseline!r}, but the optimizers are {', '.join(names)}"
            f"{nearest(race.baseline, names)}: name one of them"
        )
    if race.headline and race.headline not in names:
        raise ValueError(
            f"race.headline is {race.headline!r}, but the optimizers are {', '.join(names)}"
            f"{nearest(race.headline, names)}: name one of them, or leave it out"
        )
    if race.headline_seeds and not race.headline:
        raise ValueError("race.headline_seeds is given without race.headline: name the entry, or leave both out")
    if race.headline == race.baseline:
        raise ValueError(f"race.headline is {race.headline!r}, the baseline itself: name another, or leave it out")


def study(found: Study) -> None:
    """Refuse names that cannot stand in a file's name, and ablations of nothing or without a change."""
    _named(found.name, "study")
    twice("ablation: name", [one.name for one in found.ablations])
    for one in found.ablations:
        _ablation(one, found)


def _ablation(asked: Ablation, found: Study) -> None:
    where = f"ablation {asked.name}"
    _named(asked.name, "ablation")
    names = [one.name for one in found.optimizers]
    if asked.name in names:
        raise ValueError(f"{where} has the name of an optimizer: give it another")
    if asked.of not in names:
        raise ValueError(
            f"{where}: of is {asked.of!r}, but the optimizers are {', '.join(names)}{nearest(asked.of, names)}"
        )
    entry = found.entry(asked.of)
    for name, _ in asked.settings:
        _refuse_meaningless(name, entry, where)
    # It runs at the common batch only.
    race = replace(found.race, other_batches=())
    if refuse(entry, race, found.model, dict(asked.settings), where) == refuse(entry, race, found.model, {}, where):
        raise ValueError(f"{where} changes nothing of {asked.of}: give a setting with another value")
    twice(f"{where}: lr_factors", asked.lr_factors)
    for value in asked.lr_factors:
        if not 0 < value < math.inf:
            raise ValueError(f"{where}: lr_factors holds {value}; a factor is finite and above 0")


def _named(name: str, what: str) -> None:
    # An import path is a name, too.
    if not _NAME.fullmatch(name.replace(":", ".")):
        raise ValueError(f"{what}: the name {name!r} must consist of letters, digits, spaces, dots, - and _")
