"""The workers of a study: processes that live as long as the study advances, each with one run at a time."""

import contextlib
import multiprocessing
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from sophia.study.runs import RunSpec
from sophia.study.worker import Failed, Finished, Job, Message, Stopped, work

# A checkpoint takes a moment; what has not ended after these seconds is killed.
_PATIENCE = 30.0
_MOST_DEATHS = 2


@dataclass(kw_only=True)
class _Worker:
    process: Any
    pipe: Connection
    job: Job
    spec: RunSpec | None = None


class Pool:
    """Processes that make runs. `stop` ends them, and must be called."""

    def __init__(self, job: Job, *, workers: int, gpus: Sequence[str] = (), note: Callable[[str], None]) -> None:
        """Prepare workers; they are started when there is something to do.

        Args:
            job: What all of them need to know.
            workers: How many there may be.
            gpus: One for each worker; empty on other devices.
            note: Is told when a worker died.
        """
        assert workers >= 1
        assert not gpus or len(gpus) == workers
        self._jobs = [replace(job, gpu=gpu) for gpu in gpus] or [job] * workers
        self._workers: list[_Worker] = []
        self._deaths: dict[str, int] = {}
        self._note = note
        self._context = multiprocessing.get_context("spawn")

    @property
    def running(self) -> list[RunSpec]:
        """Runs in progress."""
        return [worker.spec for worker in self._workers if worker.spec is not None]

    @property
    def idle(self) -> int:
        """How many runs could be started now."""
        return len(self._jobs) - len(self.running)

    def start(self, spec: RunSpec) -> None:
        """Give a run to an idle worker."""
        for worker in [worker for worker in self._workers if worker.spec is None and not worker.process.is_alive()]:
            self._end(worker)  # no fault of this run
        free = next((worker for worker in self._workers if worker.spec is None), None) or self._new()
        free.spec = spec
        with contextlib.suppress(OSError):  # it died, as `wait` will notice
            free.pipe.send(spec)

    def discard(self, spec: RunSpec) -> None:
        """Remove what a finished run has left, once its result is noted."""
        shutil.rmtree(self._jobs[0].work / spec.id, ignore_errors=True)

    def wait(self, seconds: float) -> list[Message]:
        """What workers tell, as soon as one tells something; empty after so many seconds without."""
        ready = wait([worker.pipe for worker in self._workers], timeout=seconds)
        return [message for worker in list(self._workers) if worker.pipe in ready for message in self._read(worker)]

    def stop(self) -> list[Message]:
        """End all workers, with checkpoints; returns what they told last. A second Ctrl-C kills them at once."""
        messages: list[Message] = []
        try:
            for worker in self._workers:
                if worker.spec is None:
                    worker.process.kill()  # it has nothing to keep
                else:
                    worker.process.terminate()
            until = time.monotonic() + _PATIENCE
            while self.running and time.monotonic() < until:
                for pipe in wait([worker.pipe for worker in self._workers], timeout=0.2):
                    worker = next(one for one in self._workers if one.pipe is pipe)
                    told = self._drain(worker)
                    messages += told or []
                    if told is None or any(_ends(message) for message in told):
                        worker.spec = None
                        self._end(worker)
        finally:
            for worker in list(self._workers):
                self._end(worker)
        return messages

    def _new(self) -> _Worker:
        taken = [worker.job.gpu for worker in self._workers]
        job = next(job for job in self._jobs if job.gpu is None or job.gpu not in taken)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(job, theirs), daemon=True, name="sophia-study")
        process.start()
        theirs.close()  # so that its end is the end of the pipe
        worker = _Worker(process=process, pipe=ours, job=job)
        self._workers.append(worker)
        return worker

    def _read(self, worker: _Worker) -> list[Message]:
        messages = self._drain(worker)
        if messages is None:
            return self._died(worker)
        if any(_ends(message) for message in messages):
            worker.spec = None
        return messages

    def _drain(self, worker: _Worker) -> list[Message] | None:
        """What has come; None where nothing has, and nothing will."""
        messages: list[Message] = []
        try:
            while worker.pipe.poll():
                messages.append(worker.pipe.recv())
        except (EOFError, OSError):
            return messages or None
        return messages

    def _died(self, worker: _Worker) -> list[Message]:
        """Start its run again, once."""
        worker.process.join(5)
        code, spec = worker.process.exitcode, worker.spec
        self._end(worker)
        if spec is None:
            return []
        self._deaths[spec.id] = self._deaths.get(spec.id, 0) + 1
        what = f"its process ended with exit code {code} (-9: killed, likely for want of memory)"
        if self._deaths[spec.id] < _MOST_DEATHS:
            self._note(f"run {spec.id}: {what}; it is started again")
            self.start(spec)
            return []
        return [Failed(spec, f"{what}, for the second time: start the study again, perhaps with fewer --workers")]

    def _end(self, worker: _Worker) -> None:
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        if worker.process.is_alive():
            worker.process.kill()
        worker.process.join()
        worker.pipe.close()


def _ends(message: Message) -> bool:
    return isinstance(message, (Finished, Stopped, Failed))
