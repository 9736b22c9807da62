"""Checkpoints on disk: whole or not there at all, checked when read, and no pickle anywhere.

    checkpoints/step-00000100/
        model.safetensors       weights by name
        optimizer.safetensors   the optimizers' tensors, as "number/parameter/key"
        state.json              everything else that decides the next step
        manifest.json           size and SHA-256 of the others, written last

A checkpoint is written into a folder whose name begins with a dot, flushed to the disk, and renamed: a kill or a full
disk at any moment leaves the earlier ones as they were.
"""

import atexit
import hashlib
import json
import os
import shutil
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1
_PREFIX = "step-"
_PARTIAL = ".partial-"
_REPLACED = ".replaced-"
_THREAD = "checkpoint"
_INTERRUPTED = 130
_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One moment of a run, in plain CPU tensors and JSON."""

    step: int
    """Updates done."""
    model: dict[str, Tensor]
    """Weights by name."""
    optimizer: dict[str, Tensor]
    """Optimizer state by "number/parameter/key"."""
    state: dict[str, Any]
    """Everything else that decides the next step."""


def path_of(folder: Path, step: int) -> Path:
    """The folder of one checkpoint."""
    return folder / f"{_PREFIX}{step:08d}"


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in order."""
    if not folder.is_dir():
        return []
    names = (entry.name.removeprefix(_PREFIX) for entry in folder.iterdir() if entry.name.startswith(_PREFIX))
    return sorted(int(name) for name in names if name.isdecimal())


def choose(folder: Path, wanted: str | int = "latest") -> Path:
    """The folder of the latest checkpoint, or of a step's.

    Raises:
        ValueError: There is none, or not of this step.
    """
    have = steps(folder)
    if not have:
        raise ValueError(f"{folder} holds no checkpoint: train further, or give another run folder")
    if wanted == "latest":
        return path_of(folder, have[-1])
    if not str(wanted).isdecimal() or int(wanted) not in have:
        listed = ", ".join(map(str, have))
        raise ValueError(f"{folder} holds no checkpoint {wanted}: it has those of steps {listed} (or say latest)")
    return path_of(folder, int(wanted))


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint whole or not at all; one of the same step is replaced.

    Raises:
        OSError: It could not be written; what was there before is intact.
    """
    final, partial = path_of(folder, checkpoint.step), folder / f"{_PARTIAL}{checkpoint.step:08d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(checkpoint.model, partial / "model.safetensors", metadata={"format": "pt"})
        save_file(checkpoint.optimizer, partial / "optimizer.safetensors")
        state = {"format": FORMAT, "step": checkpoint.step, **checkpoint.state}
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = {}
        for name in _FILES:
            _flush(partial / name)
            manifest[name] = {"bytes": (partial / name).stat().st_size, "sha256": _digest(partial / name)}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _flush(partial / "manifest.json")
        _flush(partial)
        replaced = folder / f"{_REPLACED}{checkpoint.step:08d}"
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _flush(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as problem:
        shutil.rmtree(partial, ignore_errors=True)
        have = [step for step in steps(folder) if step != checkpoint.step]
        last = f"the last complete one is of step {have[-1]}" if have else "there is no earlier one"
        raise OSError(
            f"the checkpoint of step {checkpoint.step} could not be written to {folder} ({problem}); {last}: make "
            "room, and go on with --resume"
        ) from None
    return final


def verify(path: Path) -> None:
    """Compare a checkpoint's files with its manifest.

    Raises:
        ValueError: A file is missing, or differs.
    """
    remedy = f"remove {path} to go on from the checkpoint before it"
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError
    except FileNotFoundError:
        raise ValueError(f"{path} has no manifest.json: {remedy}") from None
    except ValueError:
        raise ValueError(f"{path / 'manifest.json'} is damaged: {remedy}") from None
    for name in _FILES:
        if not (path / name).is_file():
            raise ValueError(f"{path} lacks {name}: {remedy}")
        expected = manifest.get(name, {})
        size = (path / name).stat().st_size
        if size != expected.get("bytes"):
            raise ValueError(f"{path / name} has {size} bytes instead of {expected.get('bytes')}: {remedy}")
        if _digest(path / name) != expected.get("sha256"):
            raise ValueError(f"{path / name} is damaged (its checksum differs from the manifest's): {remedy}")


def read(path: Path) -> Checkpoint:
    """Read a checkpoint after checking it.

    Raises:
        ValueError: A file is missing or damaged, or its format is of another version.
    """
    state = read_state(path)
    return Checkpoint(
        step=state["step"],
        model=load_file(path / "model.safetensors"),
        optimizer=load_file(path / "optimizer.safetensors"),
        state=state,
    )


def read_model(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON part and the weights, after checking the whole checkpoint."""
    return read_state(path), load_file(path / "model.safetensors")


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part, after checking the whole checkpoint."""
    verify(path)
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {state.get('format')}, and this version of sophia reads {FORMAT}: use the version "
            "that wrote it"
        )
    return state


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time, and removes old ones."""

    def __init__(self, folder: Path, *, keep_last: int, keep_every: int, interval: int) -> None:
        """Prepare to write.

        Args:
            folder: Where the checkpoints of one run are.
            keep_last: How many are kept, newest first.
            keep_every: Those of steps divisible by this stay for good; 0 for none.
            interval: Divides the steps of a run's regular checkpoints; the latest of these is always kept.
        """
        self.folder = folder
        self._keep_last, self._keep_every, self._interval = keep_last, keep_every, interval
        self._thread: threading.Thread | None = None
        self._error: OSError | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Begin to write; waits for the one before.

        Raises:
            OSError: The one before could not be written.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name=_THREAD, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until the checkpoint in progress is on the disk.

        Raises:
            OSError: It could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the OSError of a write that failed since the last check."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def last_regular(self) -> int | None:
        """The latest step that has a checkpoint and is divisible by the interval, once nothing is in progress."""
        self.wait()
        return _last_regular(self.folder, self._interval)

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: a rollback has made them another run's."""
        self.wait()
        for later in reversed(steps(self.folder)):
            if later > step:
                _remove(self.folder, later)

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            write(self.folder, checkpoint)
            self._prune()
        except OSError as problem:
            self._error = problem

    def _prune(self) -> None:
        # Whatever signals had written in between, a rollback finds the checkpoint that it would find without them.
        regular = _last_regular(self.folder, self._interval)
        for step in steps(self.folder)[: -self._keep_last]:
            if step != regular and not (self._keep_every and step % self._keep_every == 0):
                _remove(self.folder, step)


@atexit.register
def _leave_at_once() -> None:
    """End the process under a checkpoint that is being written: a second Ctrl-C asks for that, all else has waited.

    Python itself would stop the thread inside foreign code, and crash on it.
    """
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_INTERRUPTED)


def clear_up(folder: Path) -> None:
    """Remove what a run left that was killed while it wrote, and put back what it was about to replace.

    Comes before any other look at the checkpoints of a run that may have been killed.
    """
    if not folder.is_dir():
        return
    for old in folder.glob(f"{_REPLACED}*"):
        new = path_of(folder, int(old.name.removeprefix(_REPLACED)))
        if new.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(new)
    for left in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def _last_regular(folder: Path, interval: int) -> int | None:
    return max((step for step in steps(folder) if step % interval == 0), default=None)


def _remove(folder: Path, step: int) -> None:
    # Renamed first: a kill in between must not leave half a checkpoint under a good name.
    doomed = folder / f"{_PARTIAL}old-{step:08d}"
    path_of(folder, step).rename(doomed)
    shutil.rmtree(doomed)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
