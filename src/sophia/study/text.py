"""The text of a study: prepared data, and where it comes from."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sophia import machine
from sophia.data.manifest import MANIFEST
from sophia.data.prepare import prepare
from sophia.data.recipe import Recipe
from sophia.data.shards import Dataset
from sophia.data.sources import BUILTIN, find_sources
from sophia.prepare import usable_cores
from sophia.study.settings import Study

FOLDER = "data"
_ORIGIN = "data.json"
_BUILTIN = "builtin: the documentation and the standard library's sources of Python, as sophia prepare reads them"


@dataclass(frozen=True, kw_only=True)
class StudyText:
    """What all runs learn from."""

    dataset: Dataset
    """Tokens and tokenizer."""
    origin: str
    """Where it comes from, for the report."""
    sha256: str
    """Of the text; for builtin text its fingerprint."""


def open_text(study: Study, out: Path, *, make: bool = True, note: Callable[[str], None] = lambda _: None) -> StudyText:
    """The data of a study, read as a whole once: a folder changed in place has the old fingerprint.

    Args:
        study: The settings.
        out: The study's folder, below which builtin text is prepared.
        make: Whether runs are to learn from it: it is checked then, and builtin text prepared where it is missing.
        note: Is told of that.

    Raises:
        ValueError: The data is missing or damaged, or cannot be prepared.
        OSError: It cannot be read or written.
    """
    if study.data.folder is not None:
        dataset = _whole(study.data.folder) if make else Dataset.open(study.data.folder)
        return StudyText(dataset=dataset, origin=study.data.text, sha256=study.data.sha256)
    folder, origin = out / FOLDER, out / _ORIGIN
    if (folder / MANIFEST).exists() and origin.exists():
        dataset = _made_before(folder, study.data.tokenizer, whole=make)
    elif not make:
        raise ValueError(
            f"{folder} or {origin.name} is missing, from which the runs in {out} learned: without --report it is made "
            "again, the same where this machine's text is the same"
        )
    else:
        note("preparing this machine's own text")
        sources = find_sources((BUILTIN,), without=folder)
        (source,) = sources.items
        machine.write_json(origin, {"text": _BUILTIN, "fingerprint": source.identity[1]})
        recipe = Recipe(tokenizer=study.data.tokenizer)
        dataset = prepare(sources, folder, recipe, workers=usable_cores(), overwrite=True).dataset
    try:
        told = json.loads(origin.read_text(encoding="utf-8"))
        return StudyText(dataset=dataset, origin=told["text"], sha256=told["fingerprint"])
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{origin} is damaged ({problem!r}): delete it, and the same command makes it again") from None


def _whole(folder: Path) -> Dataset:
    dataset = Dataset.open(folder)
    dataset.verify()
    return dataset


def _made_before(folder: Path, tokenizer: str, *, whole: bool) -> Dataset:
    """Builtin text that was prepared for this study.

    Raises:
        ValueError: It is damaged, or another tokenizer made it.
    """
    try:
        dataset = _whole(folder) if whole else Dataset.open(folder)
    except ValueError as problem:
        raise ValueError(f"{problem}: delete {folder}, and the same command does so") from None
    before = dataset.manifest.origin.get("recipe", {}).get("tokenizer", tokenizer)
    if before != tokenizer:
        raise ValueError(
            f"data.tokenizer is {tokenizer}, but the study in {folder.parent} began with {before}: put it back, or "
            "start a new study with another --out"
        )
    return dataset
