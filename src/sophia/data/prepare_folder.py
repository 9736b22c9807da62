"""The folder that a preparation writes to: nothing of anybody else's in it is ever touched."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sophia.data.manifest import JOURNAL, MANIFEST, TOKENIZER, read_manifest
from sophia.data.prepare_journal import Journal, read_journal

_OURS = re.compile(
    rf"({re.escape(MANIFEST)}|{re.escape(JOURNAL)})(\.partial)?|{re.escape(TOKENIZER)}|"
    r"(train|validation)-\d{5,}\.tokens(\.partial)?"
)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder if need be and keep other preparations out. If it was made and ends up empty it is removed again.

    Raises:
        ValueError: It is a file, or another process is preparing it.
        OSError: It cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a new folder by --out")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder)
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # refused by the system unless empty


def find_journal(folder: Path, *, overwrite: bool) -> Journal | None:
    """The journal to go on from, or None to start from nothing. Changes nothing.

    Raises:
        ValueError: The folder holds finished data or files of others.
    """
    # What a process leaves that ended while it wrote the first journal says nothing.
    files = sorted(file for file in folder.iterdir() if file.name != JOURNAL + ".partial")
    others = [file.name for file in files if not _OURS.fullmatch(file.name)]
    if others or (files and not (folder / MANIFEST).is_file() and not (folder / JOURNAL).is_file()):
        names = ", ".join((others or [file.name for file in files])[:3])
        raise ValueError(f"{folder} holds other files ({names}); name a new folder by --out")
    finished = (folder / MANIFEST).is_file()
    if finished:
        read_manifest(folder)  # a ValueError if it is not ours
    if finished and not overwrite:
        raise ValueError(f"{folder} holds finished data; name another --out, or replace it by --overwrite")
    journal = read_journal(folder)
    if overwrite or journal is None or not journal.splits:
        return None  # also when it was stopped before the first document: nothing would be lost
    return journal


def clear(folder: Path) -> None:
    """Remove everything of ours. ``find_journal`` has found nothing else."""
    # The manifest first: a folder without it is unfinished, whatever else is still there. The journal last: a folder
    # with it is ours.
    files = sorted(folder.iterdir(), key=lambda file: (file.name != MANIFEST, file.name == JOURNAL))
    for file in files:
        assert _OURS.fullmatch(file.name)
        file.unlink()


def _lock(folder: Path) -> int | None:
    try:
        import fcntl  # noqa: PLC0415 - not on Windows, where nothing keeps others out
    except ModuleNotFoundError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # raised by a file system without locks
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"{folder} is being prepared by another process; wait for it, or name another --out"
            ) from None
    return descriptor
