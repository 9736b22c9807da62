"""The display of a run: what it shows on a terminal and in a log, and that it gives the terminal back."""

import io
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
from rich.console import Console

from sophia.display import Display, _amount, _duration

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


def record(step, *, loss=3.0, clip_fraction=0.43, **more):
    return {
        "step": step,
        "tokens": 491_520 * step,
        "loss": loss,
        "lr": 6e-4,
        "grad_norm": 0.8125,
        "clip_fraction": clip_fraction,
        "tokens_per_second": 12_345.6,
        "elapsed_seconds": 1.0,
        **more,
    }


EVALUATION = {"step": 50, "tokens": 5, "val_loss": 3.25, "perplexity": 25.79, "bits_per_byte": 1.125}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def logged(total_steps=1000, start_step=0):
    """A display into a file, the file, and its clock."""
    file, clock = io.StringIO(), Clock()
    return Display(Console(file=file), total_steps=total_steps, start_step=start_step, clock=clock), file, clock


class Terminal:
    """A pseudo-terminal whose other side is read as it is written."""

    def __init__(self, width):
        reader, writer = os.openpty()
        self.file = os.fdopen(writer, "w", encoding="utf-8")
        self.console = Console(file=self.file, width=width, height=24, force_terminal=True, force_interactive=True)
        self._bytes = b""
        self._reader = reader
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        try:
            while part := os.read(self._reader, 65536):
                self._bytes += part
        except OSError:  # Linux's way to say that the other side is closed
            pass

    def written(self):
        """Close it, and all that was written."""
        self.file.close()
        self._thread.join()
        os.close(self._reader)
        return self._bytes.decode()


needs_terminal = pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")


def screen_lines(written):
    """Every line that was ever on the screen, without colours."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written))


@needs_terminal
@pytest.mark.parametrize("width", [30, 80, 120])
def test_a_terminal_has_a_bar_and_the_latest_numbers(width):
    terminal = Terminal(width)
    with Display(terminal.console, total_steps=5000, start_step=0) as display:
        display.evaluation(EVALUATION)
        display.training(record(10))
        display.note("a note about [runs]")
        display.training(record(1250))
    written = terminal.written()
    lines = screen_lines(written)
    assert max(map(len, lines)) <= width
    assert "a note about [runs]" in lines
    bar = [line for line in lines if line.startswith("step 1250/5000")]
    assert bar
    assert "━" in bar[-1]
    assert "25%" in bar[-1]
    assert "left" in bar[-1]
    numbers = [line for line in lines if line.startswith("loss ")]
    wanted = {
        30: "loss 3.000  val 3.250",
        80: "loss 3.000  val 3.250  lr 6.0e-04  clipped 43%  12.3k tok/s  614M tokens",
        120: "loss 3.000  val 3.250  lr 6.0e-04  clipped 43%  12.3k tok/s  614M tokens  grad 0.812",
    }
    assert numbers[-1].startswith(wanted[width])
    assert written.count(HIDE_CURSOR) == written.count(SHOW_CURSOR) == 1
    assert written.rstrip().endswith(SHOW_CURSOR)


@needs_terminal
def test_before_the_first_record_it_says_so():
    terminal = Terminal(80)
    with Display(terminal.console, total_steps=100, start_step=40):
        pass
    lines = screen_lines(terminal.written())
    assert any(line.startswith("step 40/100") and "40%" in line and line.rstrip().endswith("left -") for line in lines)


@needs_terminal
@pytest.mark.parametrize("failure", [ValueError("boom"), KeyboardInterrupt()])
def test_exceptions_give_the_terminal_back(failure):
    terminal = Terminal(80)

    def run():
        with Display(terminal.console, total_steps=100, start_step=0) as display:
            display.training(record(1))
            raise failure

    with pytest.raises(type(failure)):
        run()
    assert terminal.written().rstrip().endswith(SHOW_CURSOR)


@needs_terminal
def test_what_others_print_stays_above_the_bar(monkeypatch):
    terminal = Terminal(80)
    with Display(terminal.console, total_steps=100, start_step=0) as display:
        display.training(record(1))
        print("from elsewhere")
    assert "from elsewhere" in screen_lines(terminal.written())


@needs_terminal
def test_ctrl_c_gives_the_terminal_back():
    program = """
import time
from rich.console import Console
from sophia.display import Display
with Display(Console(), total_steps=9, start_step=0) as display:
    display.note("ready")
    time.sleep(60)
"""
    reader, writer = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=writer, stdout=writer, stderr=writer, start_new_session=True
    )
    os.close(writer)
    written = b""
    while b"ready" not in written:
        written += os.read(reader, 4096)
    child.send_signal(signal.SIGINT)
    try:
        while part := os.read(reader, 4096):
            written += part
    except OSError:
        pass
    os.close(reader)
    assert child.wait(30) != 0
    text = written.decode()
    assert "KeyboardInterrupt" in text
    assert text.rindex(SHOW_CURSOR) > text.rindex(HIDE_CURSOR)


def test_a_log_gets_plain_lines_and_nothing_else():
    display, file, _ = logged(total_steps=1000)
    with display:
        display.evaluation(EVALUATION)
        display.training(record(1))
        display.note("written to [there]")
    assert file.getvalue().splitlines() == [
        "step 50/1000  validation loss 3.250  perplexity 25.79  bits/byte 1.125",
        "step 1/1000  loss 3.000  val 3.250  lr 6.0e-04  clipped 43%  12.3k tok/s  492k tokens  grad 0.812",
        "written to [there]",
    ]


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"])
def test_a_log_stays_plain_where_colours_are_asked_for(variable, monkeypatch):
    monkeypatch.setenv(variable, "1")
    display, file, _ = logged()
    with display:
        display.training(record(1))
    assert "\x1b" not in file.getvalue()


def test_a_log_gets_the_first_line_the_last_and_few_between():
    display, file, clock = logged(total_steps=200_000)
    times = []
    with display:
        for step in range(1, 200_001):
            clock.now += 0.5
            before = file.tell()
            display.training(record(step))
            if file.tell() > before:
                times.append(clock.now - 1000)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert times[0] == 0.5
    assert times[-1] == 100_000
    assert min(pauses[:-1]) >= 5
    assert max(pauses) <= 60.5
    assert pauses[0] == 5
    assert 1500 < len(times) < 2500  # of 200,000, in 28 hours


@needs_terminal
def test_the_bar_moves_between_two_lines():
    terminal = Terminal(80)
    with Display(terminal.console, total_steps=5000, start_step=0) as display:
        display.training(record(10))
        display.step(14)
    lines = screen_lines(terminal.written())
    assert [line for line in lines if line.startswith("step ")][-1].startswith("step 14/5000")
    assert [line for line in lines if line.startswith("loss ")][-1].endswith("4.92M tokens  grad 0.812")  # of step 10


def test_the_time_left_follows_the_recent_pace():
    display, file, clock = logged(total_steps=10_000, start_step=1000)
    with display:
        clock.now += 500  # compiling, before the first step ends
        for step in range(1010, 2001, 10):
            clock.now += 5  # two steps a second
            display.training(record(step))
    lines = file.getvalue().splitlines()
    assert "left" not in lines[0]
    assert lines[1].startswith("step 1030/10000")
    assert lines[1].endswith("left 1:14:45")
    assert lines[-1].endswith("left 1:06:45")


def test_a_rollback_does_not_confuse_it():
    display, file, clock = logged(total_steps=100)
    with display:
        for step in (10, 20, 30, 10, 20):
            clock.now += 10
            display.training(record(step))
    places = [line.split()[1] for line in file.getvalue().splitlines()]
    assert places == ["10/100", "20/100", "30/100", "10/100", "20/100"]
    assert file.getvalue().rstrip().endswith("left 1:20")


def losses_shown(losses):
    display, file, clock = logged()
    with display:
        for step, loss in enumerate(losses, start=1):
            clock.now += 61
            display.training(record(step, loss=loss, grad_norm=loss))
    return [float(re.search(r"loss (\S+)", line)[1]) for line in file.getvalue().splitlines()]


def test_the_loss_is_smoothed():
    noisy = [3.0 + 0.2 * (-1) ** t for t in range(200)]
    assert max(abs(loss - 3) for loss in losses_shown(noisy)[100:]) < 0.03


def test_the_smoothed_loss_follows_the_first_fall():
    falling = [3 + 8 * 0.8**t for t in range(30)]
    shown = losses_shown(falling)
    assert shown[0] == 11
    assert all(before <= loss + 0.5 for before, loss in zip(shown, falling, strict=True))


def test_losses_that_are_not_finite_are_said_and_leave_no_trace():
    shown = losses_shown([4.0, math.nan, 4.0, math.inf, 4.0])
    assert [shown[0], shown[2], shown[4]] == [4, 4, 4]
    assert math.isnan(shown[1])
    assert shown[3] == math.inf


def test_an_optimizer_that_does_not_clip_has_no_such_number():
    display, file, _ = logged()
    with display:
        display.training(record(1, clip_fraction=None))
    assert "clipped" not in file.getvalue()


def test_without_a_console_it_shows_nothing(capsys):
    with Display(None, total_steps=10, start_step=0) as display:
        display.training(record(1))
        display.evaluation(EVALUATION)
        display.note("nothing")
    assert capsys.readouterr() == ("", "")


def test_amounts_and_durations():
    amounts = {
        0: "0",
        950: "950",
        999.6: "1.00k",
        12_345: "12.3k",
        99_960: "100k",
        2_457_600_000: "2.46B",
        3e12: "3.0T",
    }
    assert {value: _amount(value) for value in amounts} == amounts
    durations = {0: "0:00", 7.4: "0:07", 754: "12:34", 3599.6: "1:00:00", 10_921: "3:02:01", 187_300: "2 d 4 h"}
    assert {seconds: _duration(seconds) for seconds in durations} == durations
