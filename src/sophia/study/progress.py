"""A study as its user sees it: a line for each finished run; on a terminal also what is going on and what is best."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sophia.study.plan import Cell, Plan
from sophia.study.runs import FinishedRun, RunSpec
from sophia.study.settings import Study

_REFRESHES_PER_SECOND = 2
_LINE_SECONDS = 60.0


@dataclass(kw_only=True)
class _Going:
    spec: RunSpec
    step: int = 0
    first: int | None = None
    """Updates that an earlier piece of the study did; None until the run tells."""


class Progress:
    """What a study shows of itself, as a context manager: the terminal is given back however the block ends."""

    def __init__(self, console: Console, study: Study, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._study, self._clock = console, study, clock
        self._entries = {entry.name: entry for entry in study.optimizers}
        self._started = self._last_line = clock()
        self._going: dict[str, _Going] = {}
        self._state: Plan | None = None
        self._runs: Mapping[str, FinishedRun] = {}
        self._steps = 0  # of runs that ended since we began
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._drawn, console=console, refresh_per_second=_REFRESHES_PER_SECOND, transient=True
            )

    def plan(self, state: Plan, runs: Mapping[str, FinishedRun]) -> None:
        """Learn what is known and left."""
        self._state, self._runs = state, runs

    def begun(self, spec: RunSpec) -> None:
        """A run begins, or goes on."""
        self._going[spec.id] = _Going(spec=spec)

    def step(self, run: str, step: int) -> None:
        """A run has done so many updates."""
        one = self._going.get(run)
        if one is not None:
            one.step = step
            one.first = step if one.first is None else min(one.first, step)

    def note(self, text: str) -> None:
        """Write a line that stays."""
        self._last_line = self._clock()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def told(self, run: str, text: str) -> None:
        """Write what the trainer says of a run."""
        one = self._going.get(run)
        self.note(f"{run if one is None else self.described(one.spec)}: {text}")

    def finished(self, run: FinishedRun) -> None:
        """A run came to its end."""
        one = self._going.pop(run.spec.id, _Going(spec=run.spec))
        self._steps += run.spec.steps - (one.first or 0)
        loss = "diverged" if run.val_loss is None else f"loss {run.val_loss:.4f}"
        self.note(f"{self.described(run.spec)}  {loss}  {run.seconds:.0f} s")

    def tick(self) -> None:
        """Into a file or a pipe: say now and then that something is going on."""
        if self._live is None and self._clock() - self._last_line >= _LINE_SECONDS:
            self.note(self._summary())

    def described(self, spec: RunSpec) -> str:
        """A run in a line."""
        share = spec.tokens / self._study.race.tokens
        batch = "" if spec.tokens_per_step == self._study.race.tokens_per_step else f" at {spec.tokens_per_step}"
        return f"{spec.optimizer}  {self._changed(spec)}  {share:g} T{batch}  seed {spec.seed}"

    def seconds_left(self) -> float | None:
        """Until the end of the study at the pace so far; None while there is none."""
        done = self._steps + sum(one.step - (one.first or 0) for one in self._going.values())
        elapsed = self._clock() - self._started
        if self._state is None or done <= 0 or elapsed <= 0:
            return None
        left = self._state.steps_left - sum(one.step for one in self._going.values())
        return max(left, 0) * elapsed / done

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _summary(self) -> str:
        left = self.seconds_left()
        time_left = "" if left is None else f", about {duration(left)} left, timing apart"
        return f"{len(self._runs)} runs finished, {len(self._going)} going{time_left}"

    def _drawn(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("optimizer", "search", "finals", "best so far", "loss"):
            table.add_column(heading, justify="right" if heading == "loss" else "left")
        cells = () if self._state is None else self._state.cells
        for cell in cells:
            if cell.steps * cell.tokens_per_step == self._study.race.tokens:
                table.add_row(*self._row(cell))
        lines: list[RenderableType] = [table]
        for one in self._going.values():
            bar = ProgressBar(total=one.spec.steps, completed=one.step, width=20)
            line = Table.grid(padding=(0, 1))
            line.add_row(bar, Text(f"{one.step}/{one.spec.steps}  {self.described(one.spec)}"))
            lines.append(line)
        return Group(*lines, Text(self._summary(), style="bold"))

    def _row(self, cell: Cell) -> tuple[str, str, str, str, str]:
        known = [trial for trial in cell.trials if trial.finished]
        finals = [self._runs[spec.id].score for spec in cell.finals if spec.id in self._runs]
        searched = f"{len(known)} of {self._study.race.trials}"
        ended = f"{len(finals)} of {len(cell.finals)}" if cell.finals else ""
        batch = "" if cell.tokens_per_step == self._study.race.tokens_per_step else f" at {cell.tokens_per_step}"
        if not known:
            return f"{cell.optimizer}{batch}", searched, ended, "", ""
        best = min(known, key=lambda trial: math.inf if trial.loss is None else trial.loss)
        loss = statistics.fmean(finals) if finals else best.loss
        shown = "diverged" if loss is None or math.isinf(loss) else f"{loss:.4f}"
        return f"{cell.optimizer}{batch}", searched, ended, self._changed(best.spec), shown

    def _changed(self, spec: RunSpec) -> str:
        """What the search or an ablation has changed, not what its entry holds anyway."""
        entry = self._entries.get(spec.optimizer)
        held = {} if entry is None else dict(entry.settings)
        return ", ".join(f"{name} {_short(value)}" for name, value in spec.settings if held.get(name) != value)


def duration(seconds: float) -> str:
    """As people say it."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
