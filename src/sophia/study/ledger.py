"""The ledger of a study: `runs.jsonl`, one finished run a line, written once and never changed.

A line is on the disk when `append` returns, so a kill at any moment loses no finished run. JSON has no NaN and no
infinity: a loss that was no number is null.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sophia.study.runs import Evidence, FinishedRun, Point, RunSpec, settings

FILE = "runs.jsonl"
FORMAT = 1


class Ledger:
    """The finished runs of one study folder."""

    def __init__(self, folder: Path, *, mend: bool = True, note: Callable[[str], None] = lambda _: None) -> None:
        """Read what is there. A last line that a kill left unfinished is cut off.

        Args:
            folder: Of the study.
            mend: False only leaves that line out: another process may be writing it.
            note: Is told when something was cut off.

        Raises:
            ValueError: A line is not one of ours, or a run stands there twice; file, line and remedy are named.
            OSError: The file cannot be read or mended.
        """
        self.path = Path(folder) / FILE
        self._runs: dict[str, FinishedRun] = {}
        if self.path.exists():
            self._read(note, mend=mend)

    @property
    def runs(self) -> Mapping[str, FinishedRun]:
        """Finished runs by `RunSpec.id`, in the order in which they ended."""
        return self._runs

    def append(self, run: FinishedRun) -> None:
        """Write down a run; it is on the disk when this returns.

        Raises:
            OSError: It cannot be written, on a full disk for example; what is there of the line is cut off again.
        """
        assert run.spec.id not in self._runs, run.spec
        line = (json.dumps(to_plain(run), allow_nan=False) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            length = os.fstat(handle).st_size
            try:
                written = os.write(handle, line)
                while written < len(line):
                    written += os.write(handle, line[written:])
                os.fsync(handle)
            except OSError as problem:
                os.ftruncate(handle, length)
                raise OSError(problem.errno, problem.strerror, str(self.path)) from None
        finally:
            os.close(handle)
        self._runs[run.spec.id] = run

    def _read(self, note: Callable[[str], None], *, mend: bool) -> None:
        content = self.path.read_bytes()
        whole, _, rest = content.rpartition(b"\n")
        if rest and mend:
            note(f"{self.path}: the last line was half written and is cut off; its run is made again")
            with self.path.open("r+b") as file:
                file.truncate(len(content) - len(rest))
                os.fsync(file.fileno())
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            run = self._parsed(line, number)
            if run.spec.id in self._runs:
                raise ValueError(
                    f"{self.path}, line {number} is a second run {run.spec.id} ({run.spec.optimizer}): delete one of "
                    "the two lines"
                )
            self._runs[run.spec.id] = run

    def _parsed(self, line: bytes, number: int) -> FinishedRun:
        try:
            record = json.loads(line)
            if record["format"] != FORMAT:
                raise ValueError(f"its format is {record['format']}, and this version of sophia reads {FORMAT}")
            run = from_plain(record)
            if run.spec.id != record["id"]:
                raise ValueError(f"its id is {record['id']}, but its settings are those of {run.spec.id}")
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            reason = f"it has no {problem}" if isinstance(problem, KeyError) else str(problem)
            raise ValueError(
                f"{self.path}, line {number} is not a finished run ({reason}): delete the line, and the run is made "
                "again"
            ) from None
        return run


def to_plain(run: FinishedRun) -> dict[str, Any]:
    """A line of the ledger."""
    spec = run.spec
    return {
        "format": FORMAT,
        "id": spec.id,
        "optimizer": spec.optimizer,
        "kind": spec.kind,
        "settings": dict(spec.settings),
        "tokens_per_step": spec.tokens_per_step,
        "steps": spec.steps,
        "seed": spec.seed,
        "val_loss": _finite(run.val_loss),
        "seconds": run.seconds,
        "date": run.date,
        "evidence": None if run.evidence is None else asdict(run.evidence),
        "curve": [{name: _finite(value) for name, value in asdict(point).items()} for point in run.curve],
    }


def from_plain(record: Mapping[str, Any]) -> FinishedRun:
    """The run of a line.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: It is none.
    """
    spec = RunSpec(
        optimizer=_of(str, record, "optimizer"),
        settings=settings(**record["settings"]),
        tokens_per_step=_of(int, record, "tokens_per_step"),
        steps=_of(int, record, "steps"),
        seed=_of(int, record, "seed"),
        kind=_of(str, record, "kind"),
    )
    evidence = record["evidence"]
    loss = record["val_loss"]
    if loss is not None and not math.isfinite(float(loss)):
        raise ValueError(f"val_loss is {loss}")
    return FinishedRun(
        spec=spec,
        val_loss=None if loss is None else float(loss),
        curve=tuple(Point(**point) for point in record["curve"]),
        seconds=float(record["seconds"]),
        evidence=None if evidence is None else Evidence(**evidence),
        date=_of(str, record, "date"),
    )


def _of(kind: type, record: Mapping[str, Any], name: str) -> Any:
    value = record[name]
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}")
    return value


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
