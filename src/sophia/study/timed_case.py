"""One optimizer at its best settings, stepping as the trainer steps: what is timed, counted and weighed."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sophia import peak_memory, session
from sophia.config import TrainSettings
from sophia.display import Display
from sophia.distributed import World, world
from sophia.guards import Signals
from sophia.metrics import Metrics
from sophia.optim import kernels
from sophia.optim.sophia import Sophia
from sophia.study import flops
from sophia.study.one_run import train_settings
from sophia.study.runs import RunSpec
from sophia.study.settings import Study
from sophia.timing import timed
from sophia.train import Trainer

LEAST_STEPS = 10
"""Of a round."""
_LEAST_SECONDS = 0.5  # of a round: the noise of a machine is longer than the steps of a tiny model
_MOST_REPEATS = 20
_INTERVALS = ("curvature_interval", "basis_interval")


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    name: str
    """Of the entry or ablation."""
    spec: RunSpec
    """Its settings and batch; the seed is the search's."""


class Stepping:
    """A case in motion."""

    def __init__(self, study: Study, case: Case, *, data: Path, folder: Path, here: World, compiled: bool = True):
        """Build model and optimizer, in a run folder of its own.

        Args:
            study: What is equal for all.
            case: What is measured.
            data: The prepared data.
            folder: Is made.
            here: This process.
            compiled: False leaves torch.compile out, whatever the study says.
        """
        settings = _endless(train_settings(study, case.spec, data=data, out=folder))
        if not compiled:
            settings = replace(settings, machine=replace(settings.machine, compile="off"))
        self.session = session.start(settings, here, lambda _: None)
        display = Display(None, total_steps=1, start_step=0)
        metrics = Metrics(folder, resume_step=None, enabled=False)
        self.trainer = Trainer(self.session, display, metrics, Signals(), lambda _: None)
        self._batches = self.trainer.prefetch()
        self.steps = steps_per_round(self.session.settings)

    @property
    def refreshes(self) -> int | None:
        """Curvature estimates so far; None where the optimizer has none."""
        return self.session.optimizers.refreshes

    def run(self, steps: int) -> None:
        """So many updates, with everything that the trainer does between two looks at the numbers."""
        for _ in range(steps):
            self.trainer.update(*next(self._batches))
        self.trainer.readings.take()

    def round(self) -> float:
        """Seconds of one round of updates."""
        return timed(lambda: self.run(self.steps), self.session.here.device)

    def warm_up(self) -> None:
        """A round that does not count, and one that tells how long they must be."""
        self.round()
        self.steps *= min(max(1, math.ceil(_LEAST_SECONDS / self.round())), _MOST_REPEATS)

    def close(self) -> None:
        """End the thread that reads batches."""
        self._batches.close()


def steps_per_round(settings: TrainSettings) -> int:
    """A multiple of what the optimizer does now and then, ten at least.

    What another optimizer does now and then hardly ever differs from the default, and costs nothing here.
    """
    least = math.lcm(*(getattr(settings.optimizer, name) for name in _INTERVALS))
    return least * -(-LEAST_STEPS // least)


def weigh(study: Study, case: Case, data: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Operations and memory of a case, for a process that has done nothing else.

    The peak is, on the CPU, the highest resident memory less what was resident before the model was built, after a
    small one has loaded the libraries; on CUDA the most that PyTorch's allocator had handed out. It is that of a round
    and one step: in the first step an optimizer has no state yet beside which curvature or a basis would be made.

    Returns:
        "flops_per_step", the average over a round, and "peak_memory_bytes", None where the system does not tell.
    """
    torch.set_num_threads(threads)
    with world(study.machine.device) as here:
        small = replace(study, model=replace(study.model, layers=1, heads=1, width=16, init_from=None))
        first = Stepping(small, case, data=data, folder=folder / "small", here=here)
        _load_kernels(first)
        first.run(1)
        first.close()
        del first
        before = _now(here)
        going = Stepping(study, case, data=data, folder=folder / "memory", here=here)
        going.run(going.steps + 1)
        peak = _peak(here)
        going.close()
        del going
        counted = Stepping(study, case, data=data, folder=folder / "flops", here=here, compiled=False)
        counted.run(counted.steps)  # an optimizer may do more in its first step
        operations = flops.count(lambda: counted.run(counted.steps))
        counted.close()
        memory = None if before is None or peak is None else peak - before
        return {"flops_per_step": operations / counted.steps, "peak_memory_bytes": memory}


def _load_kernels(small: Stepping) -> None:
    """Let Sophia take the kernels that it chooses for larger models: their compiler is a hundred megabytes."""
    if kernels.problem(small.session.here.device.type) is None:
        for part in small.session.optimizers.parts:
            if isinstance(part, Sophia):
                for group in part.param_groups:
                    group["fused"] = True


def _endless(settings: TrainSettings) -> TrainSettings:
    """With a schedule that the measurement does not come to the end of, and nothing to be told on the way.

    What is told is no part of an update; but after it, with curvature estimated then, it would have to be asked for.
    """
    steps = max(settings.schedule.steps or 0, 1_000_000)
    return replace(
        settings,
        schedule=replace(settings.schedule, steps=steps),
        logging=replace(settings.logging, log_interval=steps),
    )


def _now(here: World) -> int | None:
    try:
        now = peak_memory.now(here.device)
        peak_memory.reset(here.device)
    except (ValueError, OSError):  # the system does not tell
        return None
    return now


def _peak(here: World) -> int | None:
    try:
        return peak_memory.peak(here.device)
    except (ValueError, OSError):
        return None
