"""`sophia train` as a process of its own, killed at chosen moments."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

from sophia import checkpoint

_PAUSE = 0.0005


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A kill -9, and what it interrupted."""

    after_step: int
    """The last step that the metrics tell of; -1 before the first."""
    resumes_from: int
    """The step of the latest checkpoint; -1 where there is none."""
    while_writing: bool
    """Whether a checkpoint was half written."""


def start(*words, threads=1):
    """Begin `sophia train WORDS`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "sophia", "train", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process):
    """Wait for its end; returns its exit code and what it said."""
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def wait_for(process, ready):
    """Wait until ready() is true; False where the process ends before that."""
    while not ready():
        if process.poll() is not None:
            return False
        time.sleep(_PAUSE)
    return True


def kill(process, run, *, since=0.0):
    """kill -9 a run's process, which began at the time `since`."""
    process.kill()
    finish(process)
    return Kill(
        after_step=last_step(run), resumes_from=last_checkpoint(run), while_writing=is_writing(run, since=since)
    )


def is_writing(run, *, since=0.0):
    """Whether the folder of a checkpoint is there that has not got its name yet, and is not left from earlier."""
    return any(_changed(path) >= since for path in (run / "checkpoints").glob(".partial-0*"))


def _changed(path):
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # it has just got its name
        return -1.0


def last_checkpoint(run):
    """The step of the latest checkpoint, or -1."""
    return (checkpoint.steps(run / "checkpoints") or [-1])[-1]


def last_step(run):
    """The last step that the metrics tell of, or -1."""
    path = run / "metrics.jsonl"
    whole, _, _ = (path.read_bytes() if path.exists() else b"").rpartition(b"\n")
    return json.loads(whole.splitlines()[-1])["step"] if whole else -1
