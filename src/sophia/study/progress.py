"""A study as its user sees it: a line for each finished run, and on a terminal what is going on and what is best."""

import time
from collections.abc import Sequence

from rich.console import Console

from sophia.study.plan import Plan
from sophia.study.runs import FinishedRun, RunSpec


class Progress:
    """What a study shows of itself."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()

    def plan(self, state: Plan, running: Sequence[RunSpec]) -> None:
        """Learn what is left."""

    def begun(self, spec: RunSpec) -> None:
        """A run begins, or goes on."""

    def step(self, run: str, step: int) -> None:
        """A run has done so many updates."""

    def note(self, run: str, text: str) -> None:
        """The trainer says something about a run."""

    def finished(self, run: FinishedRun) -> None:
        """A run came to its end."""
        spec = run.spec
        settings = " ".join(f"{name} {value}" for name, value in spec.settings)
        loss = "diverged" if run.val_loss is None else f"{run.val_loss:.4f}"
        self._console.print(
            f"{spec.optimizer}  {settings}  seed {spec.seed}  {spec.steps} x {spec.tokens_per_step}  {loss}  "
            f"({run.seconds:.0f} s)",
            highlight=False,
            soft_wrap=True,
        )
