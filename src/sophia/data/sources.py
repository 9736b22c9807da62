"""What the user named, as a sorted list of sources that give documents."""

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sophia.data.blocks import COMPRESSIONS
from sophia.data.builtin import builtin_documents, fingerprint
from sophia.data.documents import LONGEST_DOCUMENT, Piece, Reading, cut, text_documents
from sophia.data.records import NEEDS_HF, dataset_documents, json_documents, parquet_documents

BUILTIN = "builtin"
HUGGING_FACE = "hf:"
# What a folder is searched for. A file that is named itself, or by a glob, is read whatever it is called.
_TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".markdown", ".rst", ".tex"})
_JSON_SUFFIXES = frozenset({".jsonl", ".ndjson"})
_PARQUET_SUFFIXES = frozenset({".parquet"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Something that gives documents, in the same order every time."""

    name: str
    """For people."""
    identity: tuple[str, ...]
    """Changes when the content does (for a file: its path, size and time of last change)."""
    size: int
    """Bytes, in whatever measure the positions of its documents count."""
    documents: Callable[[Reading], Iterator[Piece]]
    must_hold_text: bool
    """The user named it, so that it is an error if it is empty."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """All that is to be read."""

    names: tuple[str, ...]
    """As the user gave them."""
    items: tuple[Source, ...]
    skipped: tuple[tuple[str, int], ...]
    """Endings of the files in folders that were passed over, with their number, most frequent first."""

    @property
    def size(self) -> int:
        """Bytes of all together."""
        return sum(item.size for item in self.items)


def find_sources(names: Sequence[str], *, without: Path) -> Sources:
    """Look up files, folders, globs, ``hf:NAME[@CONFIG][:SPLIT]`` and ``builtin``, in the order of their naming.

    Folders are searched below, in sorted order, for known endings; files and folders whose names begin with a dot,
    and the folder ``without`` (where the result goes), are left out.

    Raises:
        ValueError: Nothing there, a kind that cannot be read, or a file that two names lead to.
    """
    if not names:
        raise ValueError("no source was named; name files, folders, globs, hf:DATASET or builtin")
    items: list[Source] = []
    skipped: Counter[str] = Counter()
    for name in names:
        found = list(_find(name, without.resolve(), skipped))
        if not found:
            raise ValueError(_nothing(name, skipped))
        items += found
    _refuse_twice(items)
    return Sources(names=tuple(names), items=tuple(items), skipped=tuple(skipped.most_common()))


def _find(name: str, without: Path, skipped: Counter[str]) -> Iterator[Source]:
    path = Path(name)
    if name == BUILTIN:
        yield _builtin()
    elif name.startswith(HUGGING_FACE):
        yield _dataset(name.removeprefix(HUGGING_FACE))
    elif path.is_dir():
        yield from _folder(path, without, skipped)
    elif path.exists():
        yield _file(path, must_hold_text=True)
    else:
        for match in sorted(glob.glob(name, recursive=True)):
            yield from (
                _find(match, without, skipped) if Path(match).is_dir() else [_file(Path(match), must_hold_text=True)]
            )


def _folder(folder: Path, without: Path, skipped: Counter[str]) -> Iterator[Source]:
    if _is_saved_dataset(folder):
        yield _dataset(str(folder))
        return
    seen = {without, folder.resolve()}  # links may lead back
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not _known(Path(place) / name, seen)
        )
        for name in sorted(files):
            path = Path(place) / name
            if name.startswith("."):
                continue
            if _kind(path) in _TEXT_SUFFIXES | _JSON_SUFFIXES | _PARQUET_SUFFIXES:
                yield _file(path, must_hold_text=False)
            else:
                skipped[path.suffix or "no ending"] += 1


def _known(folder: Path, seen: set[Path]) -> bool:
    real = folder.resolve()
    known = real in seen
    seen.add(real)
    return known


def _kind(path: Path) -> str:
    """The ending that says what a file holds, behind the one that says how it is compressed."""
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path
    return inner.suffix.lower()


def _file(path: Path, *, must_hold_text: bool) -> Source:
    kind = _kind(path)
    if not path.is_file():
        raise ValueError(f"{path} is neither a file nor a folder; name what can be read from its beginning")
    if kind in _PARQUET_SUFFIXES and path.suffix.lower() in COMPRESSIONS:
        raise ValueError(f"{path} is a compressed parquet file, which cannot be read in pieces; decompress it first")
    if kind in _JSON_SUFFIXES | {".json"}:
        documents: Callable[[Path, Reading], Iterator[Piece]] = json_documents
    else:
        documents = parquet_documents if kind in _PARQUET_SUFFIXES else text_documents
    status = path.stat()
    if status.st_size == 0 and must_hold_text:
        raise ValueError(f"{path} is empty; leave it out")
    return Source(
        name=str(path),
        identity=(str(path.resolve()), f"{status.st_size} {status.st_mtime_ns}"),
        size=status.st_size,
        documents=partial(documents, path),
        must_hold_text=must_hold_text,
    )


def _builtin() -> Source:
    texts = builtin_documents(max_bytes=1 << 62)

    def documents(reading: Reading) -> Iterator[Piece]:
        position = 0
        for document in texts:
            data = document.text.encode()
            position += len(data)
            for part in cut(data, LONGEST_DOCUMENT):
                yield Piece(part, position)

    size = sum(len(document.text.encode()) for document in texts)
    return Source(
        name=BUILTIN,
        identity=(BUILTIN, fingerprint(texts)),
        size=size,
        documents=documents,
        must_hold_text=True,
    )


def _dataset(name: str) -> Source:
    dataset, split = _open_dataset(name)
    where = f"{HUGGING_FACE}{name}"
    size = int(dataset.data.nbytes)
    return Source(
        name=where,
        identity=(where, split, str(len(dataset)), str(getattr(dataset, "_fingerprint", ""))),
        size=size,
        documents=partial(dataset_documents, dataset, where, size),
        must_hold_text=True,
    )


def _open_dataset(name: str) -> tuple[Any, str]:
    """A dataset from ``NAME_OR_FOLDER[@CONFIG][:SPLIT]``, and its split."""
    try:
        import datasets  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise ValueError(f"reading the dataset {name} needs datasets: {NEEDS_HF}") from None
    place, _, split = name.partition(":")
    place, _, config = place.partition("@")
    split = split or "train"
    saved = _is_saved_dataset(Path(place))
    try:
        dataset = datasets.load_from_disk(place) if saved else datasets.load_dataset(place, config or None, split=split)
    except Exception as problem:  # its libraries raise their own kinds, for no network as for no such name
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise ValueError(
            f"the dataset {place!r} could not be opened ({reason}); name a folder written by save_to_disk, or go online"
        ) from None
    if isinstance(dataset, dict):
        if split not in dataset:
            raise ValueError(f"{name} has no split {split!r}, but {', '.join(dataset)}; name one: hf:{place}:SPLIT")
        dataset = dataset[split]
    return dataset, split


def _is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote it with save_to_disk."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _nothing(name: str, skipped: Counter[str]) -> str:
    if Path(name).is_dir():
        passed = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common(4)) or "no files"
        known = " ".join(sorted(_TEXT_SUFFIXES | _JSON_SUFFIXES | _PARQUET_SUFFIXES))
        return f"{name} holds no text files ({passed}; looked for {known}); name others by a glob: '{name}/**/*.py'"
    return (
        f"{name!r}: no such file or folder, nothing that fits it as a glob; a dataset's name needs {HUGGING_FACE}NAME"
    )


def _refuse_twice(items: Iterable[Source]) -> None:
    seen: dict[str, str] = {}
    for item in items:
        key = item.identity[0]
        if key in seen:
            raise ValueError(f"{item.name} is named twice (as {seen[key]}); its text would count double: name it once")
        seen[key] = item.name
