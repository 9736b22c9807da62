"""The journal of an unfinished preparation: how far it is, so that it can go on after any kind of end."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sophia.data.manifest import JOURNAL

_VERSION = 1


@dataclass(kw_only=True)
class Journal:
    """What has been written for good. Everything after it is dropped and done again."""

    identity: Mapping[str, Any]
    """Settings and sources; a run with others must not go on."""
    tokenizer_sha256: str = ""
    end_of_text: str = ""
    """The token, as text."""
    source: int = 0
    """Index of the source that comes next or is being read."""
    documents: int = 0
    """Documents of that source that are done."""
    empty: int = 0
    """Records without text so far."""
    lowest: float = 1.0
    """The smallest and the largest place of a document so far."""
    highest: float = 0.0
    seconds: float = 0.0
    """Spent so far."""
    splits: dict[str, Any] = field(default_factory=dict)
    """State of each split's writer; empty before the first document."""

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all, and make sure that it survives a power failure."""
        partial = folder / (JOURNAL + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump({"version": _VERSION, **asdict(self)}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(folder / JOURNAL)


def read_journal(folder: Path) -> Journal | None:
    """The folder's journal, or None if it has none.

    Raises:
        ValueError: It is not ours.
    """
    path = folder / JOURNAL
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        if content.pop("version") != _VERSION:
            raise ValueError("another version wrote it")
        return Journal(**content)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{path} is no journal that this sophia can read ({problem}); name another folder") from None
