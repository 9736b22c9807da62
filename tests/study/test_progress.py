"""What a study shows of itself while it runs."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from sophia.study.plan import Cell, Plan, Trial
from sophia.study.progress import Progress, duration
from sophia.study.runs import FinishedRun
from tests.study import tiny


def finished(spec, loss=4.5):
    return FinishedRun(spec=spec, val_loss=loss, curve=(), seconds=12.3, evidence=None)


def state(steps_left, *trials):
    spec = trials[0].spec if trials else tiny.spec()
    cell = Cell(
        optimizer=spec.optimizer,
        steps=spec.steps,
        tokens_per_step=spec.tokens_per_step,
        trials=trials,
        best=spec.settings,
        edges=(),
        finals=(replace(spec, seed=1), replace(spec, seed=2)),
    )
    return Plan(cells=(cell,), ablations=(), wanted=(), steps_left=steps_left, done=False)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def shown(*, terminal=False):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    clock = Clock()
    return Progress(console, tiny.study(), clock), clock, console.file


def test_a_line_for_each_finished_run():
    progress, _, file = shown()
    run = finished(tiny.spec("sophia-g", gamma=0.25, steps=10, seed=7))
    progress.begun(run.spec)
    progress.finished(run)
    progress.finished(finished(tiny.spec(lr=1.0), None))
    first, second = file.getvalue().splitlines()
    assert first == "sophia-g  gamma 0.25, lr 0.003  0.5 T  seed 7  loss 4.5000  12 s"
    assert second == "adamw  lr 1  1 T  seed 1  diverged  12 s"


def test_what_the_trainer_says_names_the_run():
    progress, _, file = shown()
    progress.begun(tiny.spec(lr=1.0))
    progress.told(tiny.spec(lr=1.0).id, "spike")
    assert file.getvalue() == "adamw  lr 1  1 T  seed 1: spike\n"


def test_all_finished_runs_are_told_also_those_of_earlier_pieces():
    progress, _, file = shown(terminal=True)
    progress.plan(state(100), {one.spec.id: one for one in (finished(tiny.spec(seed=seed)) for seed in range(3))})
    with progress:
        progress.begun(tiny.spec(seed=5))
    assert "3 runs finished, 1 going" in file.getvalue()


def test_the_time_left_is_told_by_what_was_done_since_the_start():
    progress, clock, _ = shown()
    progress.plan(state(100), {})
    assert progress.seconds_left() is None
    one, other = tiny.spec(seed=1), tiny.spec(seed=2)
    progress.begun(one)
    progress.begun(other)
    progress.step(one.id, 0)
    progress.step(other.id, 15)  # which an earlier piece did
    assert progress.seconds_left() is None
    clock.now = 10.0
    progress.step(one.id, 3)
    progress.step(other.id, 17)
    assert progress.seconds_left() == pytest.approx((100 - 3 - 17) * 10 / 5)
    progress.finished(finished(other))
    progress.plan(state(80), {other.id: finished(other)})
    assert progress.seconds_left() == pytest.approx((80 - 3) * 10 / 8)


def test_something_is_said_now_and_then_into_a_file():
    progress, clock, file = shown()
    progress.plan(state(100), {})
    progress.begun(tiny.spec())
    progress.step(tiny.spec().id, 0)
    clock.now = 59.0
    progress.tick()
    assert file.getvalue() == ""
    clock.now = 60.0
    progress.step(tiny.spec().id, 10)
    progress.tick()
    progress.tick()
    assert file.getvalue() == "0 runs finished, 1 going, about 9 min left, timing apart\n"


def test_a_terminal_shows_the_best_so_far_and_what_is_going_on():
    progress, _, file = shown(terminal=True)
    better, worse = tiny.spec(seed=0, lr=0.02), tiny.spec(seed=0)
    trials = [Trial(spec=spec, loss=loss, finished=True, why="grid") for spec, loss in ((worse, 4.9), (better, 4.7))]
    final = finished(replace(worse, seed=1), 4.6)
    with progress:
        progress.plan(state(100, *trials), {})
        progress.begun(tiny.spec(seed=5))
        progress.step(tiny.spec(seed=5).id, 11)
    text = file.getvalue()
    assert "11/20" in text
    assert "adamw" in text
    assert "2 of 3" in text
    assert "lr 0.02" in text
    assert "4.7000" in text
    with progress:
        progress.plan(state(100, *trials), {final.spec.id: final})
    assert "1 of 2" in file.getvalue()
    assert "4.6000" in file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3570, "1 h 0 min"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
