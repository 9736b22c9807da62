"""A training run as its user sees it: two live lines on a terminal, plain lines now and then elsewhere."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_REFRESHES_PER_SECOND = 4
_SMOOTHING = 0.9  # weight of the past in the loss that is shown …
_YOUNG = 8  # … which is a half after so many records
_PACE_RECORDS = 50  # logged steps by which the time left is told: enough of them to hold evaluations in proportion
# Plain lines come at this pace at first and more slowly later, so that a log of hours can still be read whole.
_SHORTEST_PAUSE = 5.0
_LONGEST_PAUSE = 60.0
_PAUSE_SHARE = 0.01


class Display:
    """What a run shows of itself, as a context manager.

    On a terminal it draws a bar and the latest numbers, four times a second; the terminal is given back however the
    block ends. Into a file or a pipe it writes the first line, the last one and some between: every 5 seconds at
    first, later every hundredth of the time that has passed, at least once a minute.
    """

    def __init__(
        self,
        console: Console | None,
        *,
        total_steps: int,
        start_step: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare to show.

        Args:
            console: Where to; None shows nothing, as ranks other than the first do.
            total_steps: Updates of the whole run.
            start_step: Updates that earlier sessions did.
            clock: Tells seconds.
        """
        self._console = console
        self._figures = _Figures(total_steps, start_step, clock)
        self._clock = clock
        self._started = self._last_line = clock()
        self._live: Live | None = None
        if console is not None and _can_draw(console):
            self._live = Live(
                get_renderable=lambda: _Lines(self._figures),
                console=console,
                refresh_per_second=_REFRESHES_PER_SECOND,
            )

    def training(self, record: Mapping[str, Any]) -> None:
        """Show a training line of the metrics."""
        first = self._figures.pace.empty
        self._figures.training(record)
        if self._console is None or self._live is not None:
            return
        now = self._clock()
        pause = min(max(_SHORTEST_PAUSE, _PAUSE_SHARE * (now - self._started)), _LONGEST_PAUSE)
        if first or record["step"] >= self._figures.total_steps or now - self._last_line >= pause:
            self._last_line = now
            parts = [f"{label} {value}".strip() for label, value in self._figures.parts()]
            left = self._figures.pace.left(self._figures.total_steps)
            self.note("  ".join([f"step {self._figures.place}", *parts, *([] if left is None else [f"left {left}"])]))

    def step(self, done: int) -> None:
        """Move the bar, between two lines, to so many updates done."""
        self._figures.step = done

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Show an evaluation line of the metrics."""
        self._figures.validation_loss = record["val_loss"]
        if self._live is None:
            parts = [
                f"step {record['step']}/{self._figures.total_steps}  validation loss {_number(record['val_loss'])}"
            ]
            if record.get("perplexity") is not None:
                parts.append(f"perplexity {record['perplexity']:.{2 if record['perplexity'] < 1000 else 0}f}")
            if record.get("bits_per_byte") is not None:
                parts.append(f"bits/byte {_number(record['bits_per_byte'])}")
            self.note("  ".join(parts))

    def note(self, text: str) -> None:
        """Write a line that stays: above the bar, or among the other lines."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


class _Figures:
    """The latest numbers of a run."""

    def __init__(self, total_steps: int, start_step: int, clock: Callable[[], float]) -> None:
        self.total_steps = total_steps
        self.step = start_step
        self.pace = _Pace(clock)
        self.validation_loss: float | None = None
        self._loss = _Smoothed()
        self._latest: Mapping[str, Any] = {}

    def training(self, record: Mapping[str, Any]) -> None:
        # The live display reads from a thread of its own: each of these is one assignment, and the record comes last.
        self._loss.add(record["loss"])
        self.pace.add(record["step"])
        self.step = record["step"]
        self._latest = record

    @property
    def place(self) -> str:
        return f"{self.step}/{self.total_steps}"

    def parts(self) -> Iterator[tuple[str, str]]:
        """Label and value, the most important first; what is not known is left out."""
        latest = self._latest
        if not latest:
            return
        yield "loss", _number(self._loss.value if math.isfinite(latest["loss"]) else latest["loss"])
        if self.validation_loss is not None:
            yield "val", _number(self.validation_loss)
        yield "lr", f"{latest['lr']:.1e}"
        if latest.get("clip_fraction") is not None:
            yield "clipped", f"{latest['clip_fraction']:.0%}"
        if latest.get("tokens_per_second") is not None:
            yield "", f"{_amount(latest['tokens_per_second'])} tok/s"
        yield "", f"{_amount(latest['tokens'])} tokens"
        yield "grad", _number(latest["grad_norm"])


class _Lines:
    """The figures drawn to the width of the terminal: the bar, and the numbers that fit below it."""

    def __init__(self, figures: _Figures) -> None:
        self._figures = figures

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        figures = self._figures
        bar = Table.grid(expand=True, padding=(0, 1))
        for ratio in (None, 1, None, None):
            bar.add_column(ratio=ratio, no_wrap=True)
        share = min(figures.step / figures.total_steps, 1.0)
        bar.add_row(
            Text(f"step {figures.place}", style="bold"),
            ProgressBar(total=figures.total_steps, completed=figures.step),
            f"{share:4.0%}",
            f"left {figures.pace.left(figures.total_steps) or '-'}",
        )
        yield bar
        yield self._numbers(options.max_width)

    def _numbers(self, width: int) -> Text:
        line = Text(no_wrap=True, overflow="crop")
        for label, value in self._figures.parts():
            part = Text.assemble((f"{label} " if label else "", "dim"), value)
            gap = 2 if line else 0
            if line.cell_len + gap + part.cell_len > width:
                break
            line.append(" " * gap).append_text(part)
        return line


class _Smoothed:
    """A mean of the recent past, short at first: early losses fall fast. What is not finite is left out."""

    def __init__(self) -> None:
        self.value = math.nan
        self._count = 0

    def add(self, value: float) -> None:
        if math.isfinite(value):
            past = min(self._count / (self._count + _YOUNG), _SMOOTHING)
            self.value = past * self.value + (1 - past) * value if self._count else value
            self._count += 1


class _Pace:
    """How fast the steps follow each other."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._recent: tuple[tuple[float, int], ...] = ()

    @property
    def empty(self) -> bool:
        return not self._recent

    def add(self, step: int) -> None:
        kept = self._recent[-_PACE_RECORDS + 1 :]
        if kept and step <= kept[-1][1]:
            kept = ()  # the run went back
        self._recent = (*kept, (self._clock(), step))

    def left(self, total_steps: int) -> str | None:
        """Time to the end, if the steps go on as the recent ones did; None while that is not known."""
        recent = self._recent
        if len(recent) < 2:
            return None
        (began, first), (ended, last) = recent[0], recent[-1]
        seconds = (total_steps - last) * (ended - began) / (last - first) - (self._clock() - ended)
        return _duration(max(seconds, 0.0))


def _can_draw(console: Console) -> bool:
    """Whether lines can be overwritten; FORCE_COLOR alone makes no terminal of a log file."""
    return console.is_interactive and console.file.isatty()


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else str(value)


def _amount(value: float) -> str:
    """950, 12.3k, 4.56M, 1.23B …: three digits."""
    for unit in ("", "k", "M", "B"):
        if value < 999.5:
            digits = 0 if value >= 99.95 or not unit else 1 if value >= 9.995 else 2
            return f"{value:.{digits}f}{unit}"
        value /= 1000
    return f"{value:.1f}T"


def _duration(seconds: float) -> str:
    """0:07, 12:34, 3:02:01, 2 d 4 h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
