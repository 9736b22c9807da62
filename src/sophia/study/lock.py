"""What a study may not change once it has begun: `lock.json`."""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sophia import machine

FILE = "lock.json"
FORMAT = 1
_ABSENT = "nothing"


@dataclass(frozen=True, kw_only=True)
class Lock:
    """The frozen part of a study."""

    frozen: Mapping[str, Any]
    """Nested tables of keys, as the study file has them; a kind of JSON."""
    data: str
    """Fingerprint of the prepared data."""
    committed: bool | None = None
    """Whether the study file was in git, unchanged, when the first run of an entry under test started; None: there was
    none yet, or no repository."""
    tested: bool = False
    """Whether such a run has started."""

    @property
    def digest(self) -> str:
        """SHA-256 of what is frozen."""
        return hashlib.sha256(json.dumps([self.frozen, self.data], sort_keys=True).encode()).hexdigest()


def take(folder: Path, frozen: Mapping[str, Any], data: str, *, begun: bool) -> Lock:
    """Compare with the folder's lock, or write it where no run is finished yet.

    Args:
        folder: Of the study.
        frozen: What the study file says now.
        data: Fingerprint of the data now.
        begun: Whether a run is finished, from which on nothing may change.

    Returns:
        The lock that holds.

    Raises:
        ValueError: Something frozen has changed, or the lock is missing or damaged; key and remedy are named.
    """
    frozen = json.loads(json.dumps(frozen))  # as it will be read
    if not begun:
        lock = Lock(frozen=frozen, data=data)
        write(folder, lock)
        return lock
    lock = read(folder)
    for key, (then, now) in differences(lock.frozen, frozen).items():
        raise ValueError(
            f"{key} is {shown(now)}, but the study in {folder} began with {shown(then)}: put it back, or start a new "
            "study with another --out"
        )
    if lock.data != data:
        raise ValueError(
            f"the data changed: the study in {folder} began with data whose fingerprint begins with {lock.data[:12]}, "
            f"now it is {data[:12]}: put the data back, or start a new study with another --out"
        )
    return lock


def write(folder: Path, lock: Lock) -> None:
    """Write the folder's lock whole or not at all."""
    content = {
        "format": FORMAT,
        "digest": lock.digest,
        "data": lock.data,
        "frozen": lock.frozen,
        "tested": lock.tested,
        "committed": lock.committed,
    }
    machine.write_json(folder / FILE, content)


def note_test(folder: Path, lock: Lock, study_file: Path | None) -> Lock:
    """Record, once, that an entry under test is about to run, and whether the study file was committed before."""
    if lock.tested:
        return lock
    lock = replace(lock, tested=True, committed=committed(study_file))
    write(folder, lock)
    return lock


def committed(study_file: Path | None) -> bool | None:
    """Whether git has this file as it is now; None where there is no git, no work tree or no file."""
    if study_file is None:
        return None
    place = study_file.resolve()
    if _git(place.parent, "rev-parse", "--is-inside-work-tree") != "true":
        return None
    tracked = _git(place.parent, "ls-files", "--error-unmatch", place.name)
    return tracked is not None and _git(place.parent, "status", "--porcelain", "--", place.name) == ""


def differences(then: Mapping[str, Any], now: Mapping[str, Any], table: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys, with their tables, whose values differ: (then, now)."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*then, *(key for key in now if key not in then)]:
        name = f"{table}.{key}" if table else key
        old, new = then.get(key, _ABSENT), now.get(key, _ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, name)
        elif old != new:
            found[name] = (old, new)
    return found


def read(folder: Path) -> Lock:
    """The folder's lock as it stands.

    Raises:
        ValueError: It is missing or damaged.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, and this version of sophia reads {FORMAT}")
        lock = Lock(
            frozen=content["frozen"], data=content["data"], committed=content["committed"], tested=content["tested"]
        )
        if lock.digest != content["digest"]:
            raise ValueError("its digest is not that of its content")
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing, although runs are finished: put it back, or start a new study with another --out"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(
            f"{path} is damaged ({problem}): put it back as it was, or start a new study with another --out"
        ) from None
    return lock


def _git(folder: Path, *words: str) -> str | None:
    """What git says; None where it refuses, or is not there."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def shown(value: Any) -> str:
    """A value of the frozen part as a message tells it."""
    if value == _ABSENT:
        return _ABSENT
    return json.dumps(value) if not isinstance(value, str) else value
