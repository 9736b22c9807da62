"""The command `sophia` as several processes, launched as torchrun does, but forked: each costs milliseconds.

What torchrun adds, that it terminates the ranks when one has ended, is left to tests that start torchrun.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sophia.cli import main
from tests.distributed.ranks import PRELOADED


@dataclass
class Ended:
    """What became of one rank."""

    code: int
    out: str
    err: str


class Launched:
    """Ranks at work."""

    def __init__(self, processes, folder, store):
        self.processes, self.folder, self._store = processes, folder, store

    def send(self, rank, number):
        os.kill(self.processes[rank].pid, number)

    def wait(self, seconds=60) -> list[Ended]:
        """Until all ranks have ended; kills them and fails when they do not in time."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        ended = [
            Ended(
                process.exitcode, (self.folder / f"out-{rank}").read_text(), (self.folder / f"err-{rank}").read_text()
            )
            for rank, process in enumerate(self.processes)
        ]
        assert not late, f"ranks {late} did not end: {ended}"
        return ended


def launch(folder: Path, *words, world=2, nodes=1, prepare: Callable[[int], None] | None = None) -> Launched:
    """Start `sophia WORDS` on ranks.

    Args:
        folder: for what they print.
        words: the command line.
        world: how many ranks.
        nodes: on how many nodes they believe to be.
        prepare: called with the rank in each process before the command; from the top level of a module.
    """
    folder.mkdir(parents=True)
    # The store that torchrun's agent keeps for its ranks.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = []
    for rank in range(world):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank % (world // nodes),
            "WORLD_SIZE": world,
            "LOCAL_WORLD_SIZE": world // nodes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
        }
        environment = {name: str(value) for name, value in variables.items()}
        arguments = (folder, rank, environment, [str(word) for word in words], prepare)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        processes.append(process)
    return Launched(processes, folder, store)


def _work(folder, rank, environment, words, prepare):
    os.environ.update(environment)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(rank)
    sys.exit(main(words))
