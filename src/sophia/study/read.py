"""A study from its TOML file; every mistake is named before anything runs.

name = "first"
[data]
[model]                    as in the settings of sophia train
[race]                     budget, batch, seeds and the rule of the search
[machine]                  as in the settings of sophia train
[[optimizer]]              one for each entry: name, optimizer, hook, lr, search; other keys are its settings
search = {beta2 = [0.9, 0.95]}
[[ablation]]               name, of, lr_factors; other keys are the settings that are changed
"""

import dataclasses
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sophia.config import MachineSettings, ModelSettings, OptimizerSettings, build, converted, nearest, to_mapping
from sophia.study import check, check_race
from sophia.study.runs import Settings, Value, settings
from sophia.study.settings import Ablation, DataSettings, Entry, RaceSettings, Study

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT = Path(__file__).with_name("default.toml")
"""The study that `sophia compare` runs when it is given none."""

_ENTRY_KEYS = ("name", "optimizer", "hook", "lr", "search")
_ABLATION_KEYS = ("name", "of", "lr_factors")
# What an optimizer's table cannot set, and where it stands instead.
_ELSEWHERE = {"max_grad_norm": "it belongs into the table [race], equal for all"}
_TABLES = {"optimizer": "[[optimizer]]", "ablation": "[[ablation]]"}


@dataclass(frozen=True, kw_only=True)
class _File:
    """The tables of the file."""

    name: str
    about: str = ""
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    race: RaceSettings
    machine: MachineSettings = field(default_factory=MachineSettings)
    optimizer: tuple[dict[str, Any], ...] = ()
    ablation: tuple[dict[str, Any], ...] = ()


def read_study(path: Path | None) -> Study:
    """The study of a file; of the built-in one where ``path`` is None.

    Raises:
        ValueError: The file is not TOML, has a key or value that does not belong there, or asks for what cannot be run
            or not be judged.
        OSError: It cannot be read.
    """
    path = DEFAULT if path is None else path
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: give the TOML file of a study, or none for the built-in one"
        ) from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: give the TOML file of a study") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path} is not a TOML file: {problem}") from None
    return from_mapping(content, origin=path.name, folder=path.parent)


def from_mapping(content: Mapping[str, Any], *, origin: str, folder: Path) -> Study:
    """A study from nested tables.

    Args:
        content: The tables.
        origin: Their file's name, for errors.
        folder: Where relative paths begin.

    Raises:
        ValueError: As `read_study`.
    """
    for name, heading in _TABLES.items():
        rows = content.get(name, [])
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{origin}: {name} is no list of tables: write {heading} above the keys of each")
    file = _beside(build(_File, content, origin=origin), folder)
    try:
        check_race.race(file.race, file.model)
        check_race.data(file.data)
        entries = tuple(_entry(row, number, file) for number, row in enumerate(file.optimizer, start=1))
        check.entries(entries, file.race)
        study = Study(
            name=file.name,
            about=file.about,
            data=file.data,
            model=file.model,
            race=file.race,
            machine=file.machine,
            optimizers=entries,
            ablations=tuple(_ablation(row, number) for number, row in enumerate(file.ablation, start=1)),
        )
        check.study(study)
    except ValueError as problem:
        raise ValueError(f"{origin}: {problem}") from None
    return study


def frozen(study: Study) -> dict[str, Any]:
    """What no run may find changed once the first has finished: plain values as JSON has them, by table and key.

    The other entries and the ablations are free, since their runs carry their own settings; so are the text of the
    study and the folder of the data, whose fingerprint says whether it is the same.
    """
    baseline = study.entry(study.race.baseline)
    race = {name: list(v) if isinstance(v, tuple) else v for name, v in to_mapping(study.race).items()}
    if study.race.search_budget == 1.0:  # locks from before there was a choice
        del race["search_budget"]
    machine = to_mapping(study.machine)
    return {
        "model": to_mapping(study.model),
        "race": race,
        "machine": {name: machine[name] for name in ("precision", "compile")},
        "baseline": {
            "name": baseline.name,
            "optimizer": baseline.optimizer,
            "hook": baseline.hook,
            "lr": baseline.lr,
            "settings": {name: _plain(value) for name, value in baseline.settings},
            "search": {name: [_plain(value) for value in values] for name, values in baseline.search},
        },
    }


def _plain(value: Value) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _beside(file: _File, folder: Path) -> _File:
    """Relative paths begin where the study file stands."""
    data, model = file.data, file.model
    if data.folder is not None:
        data = dataclasses.replace(data, folder=folder / data.folder)
    if model.init_from is not None:
        model = dataclasses.replace(model, init_from=folder / model.init_from)
    return dataclasses.replace(file, data=data, model=model)


def _entry(row: Mapping[str, Any], number: int, file: _File) -> Entry:
    optimizer = row.get("optimizer")
    if not isinstance(optimizer, str):
        raise ValueError(f'optimizer number {number} names none: write optimizer = "adamw", for example')
    name = converted(row.get("name", optimizer), str, f"optimizer number {number}: name")
    where = f"optimizer {name}"
    check.optimizer(optimizer, where)
    if "lr" not in row:
        raise ValueError(f"{where}: no lr: write lr = …, the peak learning rate that its search begins with")
    hints = typing.get_type_hints(OptimizerSettings)
    own = _settings(row, _ENTRY_KEYS, where)
    lr = converted(row["lr"], float, f"{where}: lr")
    hook = converted(row.get("hook", ""), str, f"{where}: hook")
    wanted = row.get("search", {})
    if not isinstance(wanted, Mapping):
        raise ValueError(f"{where}: search is {wanted!r}; it must be a table of lists, as {{beta2 = [0.9, 0.95]}}")
    search = []
    for key, values in wanted.items():
        place = f"{where}: search.{key}"
        _refuse_unknown(key, f"{where}: search", ())
        if not isinstance(values, list) or not values:
            raise ValueError(f"{place} is {values!r}; it must be a list of values to try")
        search.append((key, tuple(converted(value, hints[key], place) for value in values)))
    entry = Entry(name=name, optimizer=optimizer, hook=hook, lr=lr, settings=own, search=tuple(search))
    return check.completed(entry, file.race, file.model)


def _ablation(row: Mapping[str, Any], number: int) -> Ablation:
    for key in ("name", "of"):
        if not isinstance(row.get(key), str):
            raise ValueError(f'ablation number {number}: no {key}: write {key} = "…"')
    where = f"ablation {row['name']}"
    factors = converted(row.get("lr_factors", []), tuple[float, ...], f"{where}: lr_factors")
    return Ablation(name=row["name"], of=row["of"], settings=_settings(row, _ABLATION_KEYS, where), lr_factors=factors)


def _settings(row: Mapping[str, Any], own: tuple[str, ...], where: str) -> Settings:
    """The keys that are settings of the optimizer."""
    hints = typing.get_type_hints(OptimizerSettings)
    found: dict[str, Value] = {}
    for key, value in row.items():
        if key not in own:
            _refuse_unknown(key, where, own)
            found[key] = converted(value, hints[key], f"{where}: {key}")
    return settings(**found)


def _refuse_unknown(key: str, where: str, own: tuple[str, ...]) -> None:
    if key in _ELSEWHERE:
        raise ValueError(f"{where}: {key} cannot stand here: {_ELSEWHERE[key]}")
    if key == "recipe" and own is not _ENTRY_KEYS:
        raise ValueError(
            f"{where}: recipe cannot stand here, what it decides is decided already: name settings instead"
        )
    if key == "lr":
        instead = "write lr_factors to try others" if own else "it is searched always, from the entry's lr"
        raise ValueError(f"{where}: lr cannot stand here: {instead}")
    known = set(check.SETTINGS) - set(_ELSEWHERE)
    if key not in known:
        raise ValueError(f"{where}: unknown key {key}{nearest(key, [*own, *sorted(known)])}")
