"""The ranks of the distributed tests: worker processes that live as long as the test session.

Starting a process costs an import of torch, a test costs milliseconds. So the workers stay, and each call gives them a
process group of their own: nothing that one test leaves behind can reach the next.
"""

import contextlib
import gc
import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# A rank that waits for another one in a collective call gives up before the parent does, so that its traceback says
# where it was.
_COLLECTIVE_LIMIT = timedelta(seconds=25)
# gloo's connections fail now and then on a busy machine ("connectFullMesh failed"), before any function is called, and
# once a worker of many groups ended with "double free or corruption". What dies each time is our own mistake.
_MEETINGS = 3
# What the server imports once, and each worker has from it in milliseconds.
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "sophia.train_command"]


class RankFailed(AssertionError):
    """A function raised on some rank; the message holds the traceback of every rank that failed."""


class Ranks:
    """A pool of worker processes, started at the first call and stopped by `close()`. Their rendezvous is in folder."""

    def __init__(self, folder: Path) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._workers: list[tuple[Any, connection.Connection]] = []
        self._folder = folder
        self._calls = 0

    def run(self, function: Callable[..., Any], *args: Any, world: int = 2, seconds: float = 60) -> list[Any]:
        """Call function(*args) on every rank of a new gloo process group.

        Args:
            function: defined at the top level of a module, because workers import it; so are its arguments' types.
            world: the number of ranks.
            seconds: the time limit for all ranks together.

        Returns:
            Each rank's result, in the order of ranks.

        Raises:
            RankFailed: the function raised on some rank.
            TimeoutError: some rank had no result in time. The workers are killed; the next call starts new ones.
        """
        for _ in range(_MEETINGS):
            self._start(world)
            self._calls += 1
            # A rendezvous by file: parallel test runs cannot take each other's port.
            store = self._folder / f"store-{self._calls}"
            for rank, (_, pipe) in enumerate(self._workers[:world]):
                pipe.send_bytes(pickle.dumps((function, args, rank, world, str(store))))
            answers = self._collect(world, seconds)
            if all(good is not None for good, _ in answers):
                break
            self.close()  # who failed to meet once numbers its next groups otherwise, and would never meet the others
        failures = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(answers) if not good]
        if failures:
            raise RankFailed("\n".join(failures))
        return [value for _, value in answers]

    def close(self) -> None:
        """Stop the workers."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self, world: int) -> None:
        while len(self._workers) < world:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def _collect(self, world: int, seconds: float) -> list[tuple[bool | None, Any]]:
        deadline = time.monotonic() + seconds
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:world])}
        answers: dict[int, tuple[bool | None, Any]] = {}
        while waiting:
            ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    answers[rank] = (None, "the process died")
            if not ready or (None, "the process died") in answers.values():
                self.close()  # a worker that hangs is of no more use, nor are those that wait for it
                if not ready:
                    raise TimeoutError(f"no result from ranks {sorted(waiting.values())} within {seconds} seconds")
                break
        return [answers.get(rank, (False, "killed, as another rank had died")) for rank in range(world)]


def _serve(pipe: connection.Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    gc.freeze()  # what exists now stays: _call's collections need not look at it
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            request = pipe.recv_bytes()
            try:
                answer = pickle.dumps(_call(*pickle.loads(request)))
            except Exception:  # not the function's: an import, the rendezvous or the pickling of its result
                answer = pickle.dumps((False, traceback.format_exc()))
            pipe.send_bytes(answer)


def _call(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world: int, store: str
) -> tuple[bool | None, Any]:
    """Whether the function returned, and what; None where the ranks have not met."""
    torch.manual_seed(0)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=_COLLECTIVE_LIMIT
        )
    except Exception:
        return None, traceback.format_exc()
    try:
        answer = True, function(*args)
    except BaseException:
        answer = False, traceback.format_exc()
    # A DDP module lives in a reference cycle and holds the group. Were it collected later, the group's destructor would
    # wait for its threads with the interpreter's lock held, which they may need: a deadlock, now and then.
    gc.collect()
    dist.destroy_process_group()
    return answer
