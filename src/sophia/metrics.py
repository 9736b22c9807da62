"""What a run measured: `metrics.jsonl`, one JSON object a line, and the trackers that get the same.

Three kinds of lines, each with the step (updates done) that it belongs to:

    training     step, tokens, loss, lr, grad_norm, clip_fraction, tokens_per_second, elapsed_seconds
    evaluation   step, tokens, val_loss, perplexity, bits_per_byte, elapsed_seconds
    event        step, event ("skipped", "spike", "rollback", …), and what else there is to say

JSON has no NaN and no infinity: a number that is not finite is written as null, and null is read as NaN.
"""

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from sophia.trackers import Tracker, open_trackers

FILE = "metrics.jsonl"
# What guards tell of a step, which they may look at long after it.
GUARD_EVENTS = ("skipped", "spike")

Record = Mapping[str, int | float | str | None]


class Metrics:
    """The record of a run in motion. Each line is on its way to the disk when ``write`` returns."""

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int | None,
        unseen: int = 0,
        track: Sequence[str] = (),
        enabled: bool = True,
    ) -> None:
        """Open the record.

        Args:
            folder: The run folder.
            resume_step: Updates done by the checkpoint from which the run goes on: lines of later steps are cut, and so
                is a line that a kill left unfinished. None for a run that begins.
            unseen: How many of its last steps no guard had looked at then: what guards told of them later is cut, too.
            track: Trackers that get the same numbers: "tensorboard", "wandb".
            enabled: Whether anything is written at all: one rank of many does.

        Raises:
            ValueError: A new run's record exists already, one to go on with is broken, or a tracker cannot start.
            OSError: The file cannot be written.
        """
        self.path = Path(folder) / FILE
        self._file: io.FileIO | None = None
        self._trackers: list[Tracker] = []
        if not enabled:
            return
        if resume_step is not None:
            _cut(self.path, resume_step, unseen)
        elif self.path.exists() and self.path.stat().st_size:
            raise ValueError(f"{self.path} exists already: resume that run, or name another folder")
        self._file = io.FileIO(self.path, "a")  # unbuffered: a line is written by one call
        try:
            self._trackers = open_trackers(track, Path(folder), resume_step=resume_step)
        except BaseException:
            self.close()
            raise

    def write(self, record: Record) -> None:
        """Append one line. Must hold a "step", and "loss", "val_loss" or "event".

        A step's lines come before its checkpoint: what is written later under the same step stays after a resume, and
        comes twice.

        Raises:
            OSError: The disk is full, for example. What is there of the line is dropped by a resume.
        """
        assert _kind(record) is not None, record
        if self._file is None:
            return
        line = (json.dumps({key: _plain(value) for key, value in record.items()}, allow_nan=False) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as problem:
            raise _named(problem, self.path) from None
        for tracker in self._trackers:
            tracker.write(record)

    def cut(self, step: int, unseen: int = 0) -> None:
        """Take back the lines of steps after ``step``, and what guards told of the ``unseen`` last ones up to it."""
        if self._file is None:
            return
        self._file.close()
        _cut(self.path, step, unseen)
        self._file = io.FileIO(self.path, "a")  # unbuffered: a line is written by one call
        for tracker in self._trackers:
            tracker.cut(step)

    def close(self) -> None:
        """Close file and trackers; a second call does nothing."""
        trackers, self._trackers = self._trackers, []
        file, self._file = self._file, None
        if file is not None:
            file.close()
        for tracker in trackers:
            tracker.close()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """What was read from a `metrics.jsonl`, kind by kind, in the order of the file."""

    training: list[dict[str, Any]] = field(default_factory=list)
    """Lines with a "loss"."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Lines with a "val_loss"."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """Lines with an "event"."""


def read_metrics(path: Path) -> RunMetrics:
    """Read a `metrics.jsonl`, also of a run that is still going: a last line without its end is left out.

    Raises:
        ValueError: A line is not one of ours; it is named by its number.
        OSError: The file cannot be read.
    """
    found = RunMetrics()
    of_kind = {"loss": found.training, "val_loss": found.evaluations, "event": found.events}
    for _, record, kind in _lines(path):
        of_kind[kind].append({key: math.nan if value is None else value for key, value in record.items()})
    return found


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any], str]]:
    """Every whole line: as it stands in the file, what it says, and its kind."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # the file's last, being written or cut off by a kill
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            kind = _kind(record)
            if kind is None:
                raise ValueError(
                    f"{path}, line {number} is not a line of metrics: {_shown(line)}; delete it to read the others"
                )
            yield line, record, kind


def _cut(path: Path, step: int, unseen: int = 0) -> None:
    """Write the file anew, beside and then in its place, without lines of later steps or an unfinished one."""
    if not path.exists():
        return
    last = dict.fromkeys(GUARD_EVENTS, step - unseen)
    kept = [line for line, record, _ in _lines(path) if record["step"] <= last.get(record.get("event", ""), step)]
    if sum(map(len, kept)) == path.stat().st_size:
        return
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        with partial.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as problem:
        raise _named(problem, partial) from None


def _named(problem: OSError, path: Path) -> OSError:
    """The same error with the file's name, which a failed write does not have."""
    return OSError(problem.errno, problem.strerror, str(path))


def _kind(record: Any) -> str | None:
    """The key by which kinds of lines are told apart; None when it is no line of ours."""
    if not isinstance(record, Mapping) or not isinstance(record.get("step"), int):
        return None
    return next((key for key in ("event", "val_loss", "loss") if key in record), None)


def _plain(value: int | float | str | None) -> int | float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(line: bytes) -> str:
    text = line.rstrip().decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:60] + "…")
