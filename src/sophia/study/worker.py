"""A process that makes one run of a study after the other.

It hears from the study's process through a pipe, and ends when that does, whatever ended it.
"""

import contextlib
import gc
import os
import queue
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sophia.study.runs import FinishedRun, RunSpec
from sophia.study.settings import Study

_REPORT_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to know for all its runs."""

    study: Study
    """What is equal for all runs."""
    data: Path
    """The prepared data."""
    fingerprint: str
    """That it must have."""
    work: Path
    """Run folders are made below it."""
    threads: int
    """Of each worker, on the CPU."""
    gpu: str | None = None
    """The one that it sees; None leaves what the environment says."""


@dataclass(frozen=True)
class Step:
    """A run has done so many updates."""

    id: str
    step: int


@dataclass(frozen=True)
class Note:
    """Something that the trainer tells its user."""

    id: str
    text: str


@dataclass(frozen=True)
class Finished:
    """A run came to its end."""

    run: FinishedRun


@dataclass(frozen=True)
class Stopped:
    """A signal ended a run, which can go on later."""

    id: str


@dataclass(frozen=True)
class Failed:
    """A run cannot be made."""

    spec: RunSpec
    text: str
    trace: str = ""
    """Where it is a mistake of ours."""


Message = Step | Note | Finished | Stopped | Failed


def work(job: Job, pipe: Connection) -> None:
    """Make the runs that come through the pipe, until it closes or a signal comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the study's process, which tells its workers
    if job.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = job.gpu  # before torch looks
    wanted: queue.SimpleQueue[RunSpec] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, wanted), daemon=True).start()

    import torch  # noqa: PLC0415 - once for all runs, after the environment is set

    from sophia.guards import Signals  # noqa: PLC0415

    torch.set_num_threads(job.threads)
    signals = Signals()
    with signals.caught():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while not signals.received:
            try:
                spec = wanted.get(timeout=1.0)  # a signal is answered between two bytecodes only
            except queue.Empty:
                continue
            _send(pipe, _outcome(job, spec, signals, pipe))
            gc.collect()  # a model and its optimizer refer to each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # the next run looks how much is free


def _listen(pipe: Connection, wanted: "queue.SimpleQueue[RunSpec]") -> None:
    """Pass on what is wanted; end this process when nobody is left to want anything."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            wanted.put(pipe.recv())
    os._exit(1)


def _outcome(job: Job, spec: RunSpec, signals: Any, pipe: Connection) -> Message:
    from sophia.study import one_run  # noqa: PLC0415

    last = 0.0

    def report(step: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _REPORT_SECONDS or step == spec.steps:
            last = now
            _send(pipe, Step(spec.id, step))

    try:
        run = one_run.run(
            job.study,
            spec,
            data=job.data,
            fingerprint=job.fingerprint,
            folder=job.work / spec.id,
            signals=signals,
            report=report,
            note=lambda text: _send(pipe, Note(spec.id, text)),
        )
    except one_run.Stopped:
        return Stopped(spec.id)
    except (ValueError, OSError) as problem:
        return Failed(spec, str(problem))
    except Exception as problem:
        return Failed(spec, repr(problem), traceback.format_exc())
    return Finished(run)


def _send(pipe: Connection, message: Message) -> None:
    try:
        pipe.send(message)
    except OSError:  # nobody reads any more
        os._exit(1)
