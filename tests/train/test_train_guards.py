"""A run in which numbers go wrong: updates left out, spikes told, rollbacks, and never a checkpoint beyond repair."""

import math
import signal
import time

import pytest
import torch

from sophia import checkpoint
from sophia.data.loader import Batches
from sophia.step import Stepper
from sophia.train import Trainer
from tests.train import runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    runs.without_plots(monkeypatch)


def disturb(monkeypatch, changes):
    """changes[index](stepper, loss) -> loss is called after the gradients of that data batch."""
    original = Stepper.gradients

    def gradients(self, inputs, targets, *, index):
        loss = original(self, inputs, targets, index=index)
        return changes[index](self, loss) if index in changes else loss

    monkeypatch.setattr(Stepper, "gradients", gradients)


def nan_loss(stepper, loss):
    return loss * math.nan


def nan_gradient(stepper, loss):
    next(p for p in stepper.model.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf
    return loss


def nan_weights(stepper, loss):
    """An update went wrong: from here on every loss is NaN."""
    with torch.no_grad():
        next(stepper.model.parameters()).fill_(math.nan)
    return loss * math.nan


def high(by):
    return lambda stepper, loss: loss + by


def events(run, kind):
    return [line for line in runs.metrics(run) if line.get("event") == kind]


# ---- not finite


@pytest.mark.parametrize("optimizer", runs.OPTIMIZERS)
@pytest.mark.parametrize("damage", [nan_loss, nan_gradient])
def test_an_update_that_is_not_finite_is_left_out_and_counted(tmp_path, data, monkeypatch, capsys, optimizer, damage):
    """Also the very first one, before the optimizer has a state, and one on which curvature is due."""
    disturb(monkeypatch, dict.fromkeys((0, 3, 7), damage))
    interval = 3 if optimizer.startswith("sophia") else None
    assert runs.train(data, tmp_path / "run", optimizer=optimizer, curvature_interval=interval) == 0
    assert [event["step"] for event in events(tmp_path / "run", "skipped")] == [1, 4, 8]
    assert "step 4: loss" in (said := capsys.readouterr().out)
    assert "not finite, update left out" in said
    progress = runs.state(runs.latest(tmp_path / "run"))["progress"]
    assert (progress["not_finite"], progress["not_finite_in_row"], progress["step"]) == (3, 0, 12)
    assert all(bool(value.isfinite().all()) for value in runs.weights(tmp_path / "run").values())


def test_what_is_left_out_leaves_weights_and_optimizer_alone(tmp_path, data, monkeypatch):
    disturb(monkeypatch, {4: nan_gradient})
    flags = {"optimizer": "adamw", "checkpoint-interval": 1, "keep-last": 99}
    assert runs.train(data, tmp_path / "run", **flags) == 0
    before, after, later = (tmp_path / "run" / "checkpoints" / f"step-0000000{step}" for step in (4, 5, 6))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (before / name).read_bytes() == (after / name).read_bytes()
        assert (after / name).read_bytes() != (later / name).read_bytes()


def test_too_many_in_a_row_end_the_run_with_the_last_good_checkpoint(tmp_path, data, monkeypatch, capsys):
    disturb(monkeypatch, dict.fromkeys((1, 6, 7, 8), nan_loss))
    assert runs.train(data, tmp_path / "run", max_skipped_steps=3) == 2
    said = capsys.readouterr().err
    assert "3 updates in a row had a non-finite loss or gradient, up to step 9" in said
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints' / 'step-00000005'}" in said
    assert said.count("\n") == 1
    checkpoint.verify(runs.latest(tmp_path / "run"))


def test_the_count_of_bad_updates_in_a_row_survives_a_crash(tmp_path, data, monkeypatch, capsys):
    runs.crash_at(monkeypatch, 5)
    disturb(monkeypatch, dict.fromkeys((3, 4, 5), nan_loss))
    with pytest.raises(runs.Killed):
        runs.train(data, tmp_path / "run", max_skipped_steps=3)
    assert runs.resume(tmp_path / "run") == 2
    assert "up to step 6" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_never_saved(tmp_path, data, monkeypatch, capsys):
    """Checkpoints that are due between the mishap and its discovery would push the good ones out."""
    disturb(monkeypatch, {5: nan_weights})
    assert runs.train(data, tmp_path / "run", checkpoint_interval=2, keep_last=1, max_skipped_steps=5) == 2
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4]
    assert "step-00000004" in capsys.readouterr().err


def test_a_run_that_ends_with_weights_that_are_not_finite_says_so(tmp_path, data, monkeypatch, capsys):
    disturb(monkeypatch, {10: nan_weights})
    assert runs.train(data, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "the last weights are not finite; the last good checkpoint is" in said
    assert "step-00000010" in said


def test_crashes_among_bad_updates_leave_no_trace(tmp_path, data, monkeypatch):
    flags = {"optimizer": "sophia-g", "curvature-interval": 3, "dropout": 0.1}
    disturb(monkeypatch, {0: nan_loss, 4: nan_gradient, 6: nan_loss})
    assert runs.train(data, tmp_path / "whole", **flags) == 0
    runs.crash_at(monkeypatch, 1, 6, 9)
    runs.through_crashes(data, tmp_path / "crashed", **flags)
    runs.assert_equal(tmp_path / "whole", tmp_path / "crashed")


# ---- looks. Every fourth step, every sixth and every tenth one something is logged, evaluated or saved.

RARELY = {"log-interval": 4, "eval-interval": 6, "checkpoint-interval": 10, "steps": 32}


def test_guards_look_when_something_is_told_or_kept(tmp_path, data, monkeypatch):
    """An update is left out at once; what is told of it, later, has its own step."""
    bad = {1: nan_loss, 5: nan_gradient, 8: nan_loss, 14: nan_gradient}
    disturb(monkeypatch, bad)
    flags = {**RARELY, "optimizer": "sophia-g", "curvature-interval": 3, "dropout": 0.1, "keep-last": 9}
    assert runs.train(data, tmp_path / "often", **flags | {"log-interval": 1}) == 0
    assert runs.train(data, tmp_path / "rarely", **flags) == 0
    often, rarely = (runs.latest(tmp_path / run) for run in ("often", "rarely"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (often / name).read_bytes() == (rarely / name).read_bytes()
    assert runs.state(often)["progress"] == runs.state(rarely)["progress"]
    assert events(tmp_path / "often", "skipped") == events(tmp_path / "rarely", "skipped")
    regular = runs.state(checkpoint.path_of(tmp_path / "rarely" / "checkpoints", 10))["progress"]
    assert (regular["not_finite"], regular["unseen"]) == (3, [])
    lines = runs.metrics(tmp_path / "rarely")
    told = {
        line["step"]: next(later["step"] for later in lines[number:] if "event" not in later)
        for number, line in enumerate(lines)
        if "event" in line
    }
    assert told == {2: 4, 6: 6, 9: 12, 15: 16}


def test_too_many_in_a_row_are_counted_up_at_the_look(tmp_path, data, monkeypatch, capsys):
    """Sound steps that follow before the look change nothing."""
    seen = []
    disturb(monkeypatch, dict.fromkeys((12, 13, 14), nan_loss))
    runs.before_batch(monkeypatch, seen.append)
    assert runs.train(data, tmp_path / "run", max_skipped_steps=2, **RARELY) == 2
    assert "2 updates in a row had a non-finite loss or gradient, up to step 14" in capsys.readouterr().err
    assert seen[-1] == 15


# Steps that no guard has looked at when the run stops after these batches; looks are after steps 10, 12 and 16.
UNSEEN = {10: 1, 12: 1, 13: 2, 14: 3, 15: 0}


@pytest.mark.parametrize(("stops", "crash"), [((13,), None), ((10, 15), None), ((12, 13, 14), 17)])
def test_stops_between_looks_leave_no_trace(tmp_path, data, monkeypatch, stops, crash):
    """What was not looked at is in the checkpoint; a crash later makes the guards tell it a second time."""
    disturb(monkeypatch, dict.fromkeys((12, 13, 14), nan_loss))
    assert runs.train(data, tmp_path / "whole", **RARELY) == 0
    runs.signal_at(monkeypatch, signal.SIGTERM, *stops)
    if crash is not None:
        runs.crash_at(monkeypatch, crash)
    outcomes = [outcome(runs.train, data, tmp_path / "stopped", **RARELY)]
    while outcomes[-1] != 0:
        if outcomes[-1] == 143:
            unseen = runs.state(runs.latest(tmp_path / "stopped"))["progress"]["unseen"]
            assert len(unseen) == UNSEEN[stops[len(outcomes) - 1]]
        outcomes.append(outcome(runs.resume, tmp_path / "stopped"))
    assert outcomes == [*[143] * len(stops), *([] if crash is None else ["crashed"]), 0]
    runs.assert_equal(tmp_path / "whole", tmp_path / "stopped")


def test_a_stop_between_looks_saves_no_weights_that_are_not_finite(tmp_path, data, monkeypatch):
    disturb(monkeypatch, {12: nan_weights})
    runs.signal_at(monkeypatch, signal.SIGTERM, 13)
    assert runs.train(data, tmp_path / "run", **RARELY) == 143
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [10]


def outcome(start, *args, **flags):
    """The exit code, or that it crashed."""
    try:
        return start(*args, **flags)
    except runs.Killed:
        return "crashed"


def test_a_checkpoint_from_before_there_were_looks(tmp_path, data, monkeypatch):
    assert runs.train(data, tmp_path / "whole") == 0
    runs.crash_at(monkeypatch, 7)
    with pytest.raises(runs.Killed):
        runs.train(data, tmp_path / "old")
    read_state = checkpoint.read_state

    def without(path):
        state = read_state(path)
        del state["progress"]["unseen"]
        return state

    monkeypatch.setattr(checkpoint, "read_state", without)
    assert runs.resume(tmp_path / "old") == 0
    runs.assert_equal(tmp_path / "whole", tmp_path / "old")


# ---- spikes. The watch needs a past of 32 losses.

SPIKY = {"steps": 50, "eval-interval": 20, "checkpoint-interval": 10, "optimizer": "adamw"}


def test_a_spike_is_told_and_the_run_goes_on(tmp_path, data, monkeypatch, capsys):
    disturb(monkeypatch, {40: high(30.0)})
    assert runs.train(data, tmp_path / "run", **SPIKY) == 0
    assert [event["step"] for event in events(tmp_path / "run", "spike")] == [41]
    assert events(tmp_path / "run", "rollback") == []
    assert "step 41: the loss" in capsys.readouterr().out
    assert runs.state(runs.latest(tmp_path / "run"))["progress"]["skipped"] == 0


def rollback(data, run, **more):
    return runs.train(data, run, **{**SPIKY, "on-spike": "rollback", **more})


def test_a_rollback_skips_the_batches_since_the_last_checkpoint(tmp_path, data, monkeypatch, capsys):
    seen = []
    disturb(monkeypatch, {44: high(30.0)})
    runs.before_batch(monkeypatch, seen.append)
    assert rollback(data, tmp_path / "run") == 0
    assert seen == [*range(45), *range(45, 55)]  # updates 41 to 50 learn from the batches 45 to 54
    assert "back to the checkpoint of step 40; 5 batches left out" in capsys.readouterr().out
    assert events(tmp_path / "run", "rollback") == [
        {"step": 41, "event": "rollback", "spike_step": 45, "from_step": 45, "skipped_batches": 5}
    ]
    steps = [line["step"] for line in runs.metrics(tmp_path / "run") if "lr" in line]
    assert steps == list(range(1, 51))
    assert runs.state(runs.latest(tmp_path / "run"))["progress"]["skipped"] == 5


def test_after_a_rollback_training_is_that_of_a_run_without_those_batches(tmp_path, data, monkeypatch):
    """The whole state is that of the checkpoint: weights, optimizer, curvature phase, learning rate."""
    flags = {"optimizer": "sophia-g", "curvature-interval": 3, "dropout": 0.1}
    spike = {44: high(30.0)}
    with monkeypatch.context() as patched:
        disturb(patched, spike)
        assert rollback(data, tmp_path / "rolled", **flags) == 0
    step = Batches.step
    monkeypatch.setattr(Batches, "step", lambda self, index, rows: step(self, index + 5 * (index >= 40), rows))
    gradients = Stepper.gradients
    monkeypatch.setattr(
        Stepper,
        "gradients",
        lambda self, inputs, targets, index: gradients(self, inputs, targets, index=index + 5 * (index >= 40)),
    )
    assert runs.train(data, tmp_path / "without", **SPIKY | flags) == 0
    rolled, without = (runs.latest(tmp_path / run) for run in ("rolled", "without"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (rolled / name).read_bytes() == (without / name).read_bytes()
    assert runs.state(rolled)["progress"]["recent"] == runs.state(without)["progress"]["recent"]


SEEN_LATE = {"log-interval": 4, "eval-interval": 24}


def test_a_rollback_leaves_out_the_batches_up_to_the_look(tmp_path, data, monkeypatch, capsys):
    seen = []
    disturb(monkeypatch, {44: high(30.0), 45: nan_loss})
    runs.before_batch(monkeypatch, seen.append)
    assert rollback(data, tmp_path / "run", **SEEN_LATE) == 0
    assert seen == [*range(48), *range(48, 58)]  # updates 41 to 50 learn from the batches 48 to 57
    assert "back to the checkpoint of step 40; 8 batches left out" in capsys.readouterr().out
    assert events(tmp_path / "run", "rollback") == [
        {"step": 41, "event": "rollback", "spike_step": 45, "from_step": 48, "skipped_batches": 8}
    ]
    assert events(tmp_path / "run", "skipped") == []


@pytest.mark.parametrize("stops", [(43, 45), (46, 49, 51)])
def test_stops_between_looks_do_not_change_a_rollback(tmp_path, data, monkeypatch, stops):
    flags = {**SEEN_LATE, "dropout": 0.1}
    disturb(monkeypatch, {42: nan_loss, 44: high(30.0), 50: high(30.0)})
    assert rollback(data, tmp_path / "whole", **flags) == 0
    assert len(events(tmp_path / "whole", "rollback")) == 2
    runs.signal_at(monkeypatch, signal.SIGTERM, *stops)
    assert rollback(data, tmp_path / "stopped", **flags) == 143
    assert [runs.resume(tmp_path / "stopped") for _ in stops] == [*[143] * (len(stops) - 1), 0]
    runs.assert_equal(tmp_path / "whole", tmp_path / "stopped")


def test_a_rollback_to_a_stop_between_looks(tmp_path, data, monkeypatch):
    """Which is where a run goes back to that is resumed with another interval of checkpoints."""
    disturb(monkeypatch, {41: nan_loss, 43: high(30.0)})
    runs.signal_at(monkeypatch, signal.SIGTERM, 42)
    assert rollback(data, tmp_path / "run", **SEEN_LATE) == 143
    assert runs.resume(tmp_path / "run", checkpoint_interval=1) == 0
    assert [event["from_step"] for event in events(tmp_path / "run", "rollback")] == [44]
    assert [event["step"] for event in events(tmp_path / "run", "skipped")] == [42]
    assert runs.state(runs.latest(tmp_path / "run"))["progress"]["not_finite"] == 1


def test_rollbacks_to_one_checkpoint_are_bounded(tmp_path, data, monkeypatch, capsys):
    disturb(monkeypatch, {index: high(30.0) for index in range(44, 80)})
    assert rollback(data, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "the loss spiked again after 5 rollbacks to step 40" in said
    assert "step-00000040" in said
    assert len(events(tmp_path / "run", "rollback")) == 5
    assert runs.resume(tmp_path / "run") == 2, "a resume does not start the count again"


def test_a_spike_before_the_first_checkpoint_ends_nothing(tmp_path, data, monkeypatch, capsys):
    disturb(monkeypatch, {40: high(30.0)})
    assert rollback(data, tmp_path / "run", checkpoint_interval=45) == 0
    assert "no checkpoint to return to yet" in capsys.readouterr().out


def test_a_checkpoint_in_progress_is_what_a_rollback_waits_for(tmp_path, data, monkeypatch):
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: time.sleep(0.2) or write(*args))
    disturb(monkeypatch, {40: high(30.0)})
    assert rollback(data, tmp_path / "run") == 0
    assert events(tmp_path / "run", "rollback")[0]["step"] == 41


@pytest.mark.parametrize("batches", [(45,), (46,), (41, 45, 48)], ids=["right after", "one step later", "all around"])
def test_crashes_around_rollbacks_leave_no_trace(tmp_path, data, monkeypatch, batches):
    """Two rollbacks to one checkpoint, at batches 44 and 47."""
    flags = {"optimizer": "sophia-g", "curvature-interval": 3, "dropout": 0.1}
    disturb(monkeypatch, {44: high(30.0), 47: high(30.0)})
    assert rollback(data, tmp_path / "whole", **flags) == 0
    assert len(events(tmp_path / "whole", "rollback")) == 2
    runs.crash_at(monkeypatch, *batches)
    runs.through_crashes(data, tmp_path / "crashed", **SPIKY | {"on-spike": "rollback"} | flags)
    runs.assert_equal(tmp_path / "whole", tmp_path / "crashed")


@pytest.mark.parametrize("written", [True, False], ids=["after", "before"])
def test_a_crash_around_the_writing_of_a_rollback_leaves_no_trace(tmp_path, data, monkeypatch, written):
    """Between the metrics' line of it and the checkpoint that knows of it, and just after that."""
    disturb(monkeypatch, {44: high(30.0)})
    assert rollback(data, tmp_path / "whole") == 0
    save = Trainer._save
    crashed = []

    def crash(self):
        if self.progress.skipped and not crashed:
            crashed.append(True)
            if written:
                save(self)
                self.writer.wait()
            raise runs.Killed
        save(self)

    monkeypatch.setattr(Trainer, "_save", crash)
    with pytest.raises(runs.Killed):
        rollback(data, tmp_path / "crashed")
    assert runs.resume(tmp_path / "crashed") == 0
    runs.assert_equal(tmp_path / "whole", tmp_path / "crashed")


@pytest.mark.parametrize("keep_last", [1, 2])
def test_checkpoints_of_signals_do_not_change_where_a_rollback_goes(tmp_path, data, monkeypatch, keep_last):
    flags = {"keep_last": keep_last, "dropout": 0.1, "steps": 48}
    disturb(monkeypatch, {44: high(30.0), 46: high(30.0)})
    assert rollback(data, tmp_path / "whole", **flags) == 0
    assert len(events(tmp_path / "whole", "rollback")) == 2
    runs.signal_at(monkeypatch, signal.SIGTERM, 41, 42, 45, 48)
    assert rollback(data, tmp_path / "stopped", **flags) == 143
    assert [runs.resume(tmp_path / "stopped") for _ in range(4)] == [143, 143, 143, 0]
    runs.assert_equal(tmp_path / "whole", tmp_path / "stopped")


# ---- signals


def test_a_second_interrupt_leaves_at_once(tmp_path, data, monkeypatch, capsys):
    def act(index):
        if index == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("still here")

    whole = tmp_path / "whole"
    assert runs.train(data, whole) == 0
    with monkeypatch.context() as patched:
        runs.before_batch(patched, act)
        assert runs.train(data, tmp_path / "run") == 130
    assert capsys.readouterr().err == "sophia: interrupted\n"
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [5]
    assert runs.resume(tmp_path / "run") == 0
    runs.assert_equal(whole, tmp_path / "run")
