"""A run that was stopped, however and how often, and one that was not are the same bit for bit."""

import shutil
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from sophia import checkpoint, micro_batch, train
from sophia.config import TrainSettings, read_toml, write_toml
from tests.train import runs

# Everything that has a state or could have one: dropout, low precision, a curvature interval that divides nothing else,
# a remainder micro-batch (in all small runs), a schedule of three parts, exceptions from weight decay, biases.
RICH = {
    "dropout": 0.1,
    "precision": "bf16",
    "schedule": "wsd",
    "decay-fraction": 0.5,
    "decay-by-name": "tokens.*=0",
    "bias": True,
}
SOPHIA = {"curvature-interval": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    runs.without_plots(monkeypatch)


def rich(optimizer):
    return {"optimizer": optimizer, **RICH, **(SOPHIA if optimizer.startswith("sophia") else {})}


@pytest.mark.parametrize("optimizer", runs.OPTIMIZERS)
def test_crashes_leave_no_trace(tmp_path, data, monkeypatch, optimizer):
    """Before the first checkpoint, just after one, before a curvature refresh that is due, in the last step."""
    flags = rich(optimizer)
    assert runs.train(data, tmp_path / "whole", **flags) == 0
    runs.crash_at(monkeypatch, 2, 5, 8, 11)
    runs.through_crashes(data, tmp_path / "crashed", **flags)
    runs.assert_equal(tmp_path / "whole", tmp_path / "crashed")


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h", "sophia-k", "muon"])
def test_a_checkpoint_right_before_a_refresh(tmp_path, data, monkeypatch, optimizer):
    """The first thing that a resumed run does is then a refresh, with dropout in its forward pass."""
    flags = rich(optimizer) | {"checkpoint-interval": 3}
    assert runs.train(data, tmp_path / "whole", **flags) == 0
    runs.crash_at(monkeypatch, 6)
    runs.through_crashes(data, tmp_path / "crashed", **flags)
    runs.assert_equal(tmp_path / "whole", tmp_path / "crashed")


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h"])
def test_state_in_bf16_is_kept_and_its_noise_goes_on(tmp_path, data, monkeypatch, optimizer):
    flags = rich(optimizer) | {"state-dtype": "bf16"}
    assert runs.train(data, tmp_path / "whole", **flags) == 0
    saved = load_file(runs.latest(tmp_path / "whole") / "optimizer.safetensors")
    kinds = {value.dtype for name, value in saved.items() if not name.endswith("step")}
    assert kinds == {torch.bfloat16}
    runs.crash_at(monkeypatch, 2, 8)
    runs.through_crashes(data, tmp_path / "crashed", **flags)
    runs.assert_equal(tmp_path / "whole", tmp_path / "crashed")


EXACT = ("step", "refreshes", "_statistics", "_basis", "exp_avg_sq")  # of Sophia-K, in whatever dtype the rest is


@pytest.mark.parametrize(
    "flags",
    [
        {"state-dtype": "bf16", "basis": "both", "others": "curvature", "refresh-when": "after"},
        {"factors": "gradients", "curvature-noise": "labels", "update-rms": 0, "orthogonalize": 0, "lr": 1e-3},
        {"diagonal": "gradients", "exponent": 0, "clip": "False", "nesterov": "False", "split-qkv": "False"},
        {"factors": "gradients", "diagonal": "gradients", "nu": 1, "product-dtype": "bf16"},
        {"basis": "none", "diagonal": "gradients", "exponent": 1, "nu": 0.2, "curvature-interval": 10},
    ],
    ids=" ".join,
)
def test_the_forms_of_sophia_k(tmp_path, data, monkeypatch, flags):
    """Between two refreshes, right after one, and right before one that is due."""
    flags = rich("sophia-k") | {"checkpoint-interval": 1} | flags
    assert runs.train(data, tmp_path / "whole", **flags) == 0
    saved = load_file(runs.latest(tmp_path / "whole") / "optimizer.safetensors")
    low = {name for name, value in saved.items() if value.dtype == torch.bfloat16}
    assert low == {name for name in saved if "state-dtype" in flags and not name.endswith(EXACT)}
    runs.crash_at(monkeypatch, 2, 4, 9)
    runs.through_crashes(data, tmp_path / "crashed", **flags)
    runs.assert_equal(tmp_path / "whole", tmp_path / "crashed")


def test_a_run_of_an_earlier_version_goes_on(tmp_path, data, monkeypatch):
    """Its config.toml has a form of curvature noise, whatever the optimizer."""
    assert runs.train(data, tmp_path / "whole", optimizer="adamw") == 0
    runs.crash_at(monkeypatch, 7)
    assert runs.crashes(runs.train, data, tmp_path / "crashed", optimizer="adamw")
    config = tmp_path / "crashed" / "config.toml"
    text = config.read_text(encoding="utf-8")
    assert "curvature_noise" not in text
    config.write_text(text.replace("[optimizer]\n", '[optimizer]\ncurvature_noise = "labels"\n'), encoding="utf-8")
    assert runs.resume(tmp_path / "crashed") == 0
    runs.assert_equal(tmp_path / "whole", tmp_path / "crashed")


def test_signs_accumulation_and_activation_checkpointing(tmp_path, data, monkeypatch):
    flags = rich("sophia-g") | {"curvature-noise": "signs", "activation-checkpointing": True, "micro-batch": 1}
    assert runs.train(data, tmp_path / "whole", **flags) == 0
    runs.crash_at(monkeypatch, 7)
    runs.through_crashes(data, tmp_path / "crashed", **flags)
    runs.assert_equal(tmp_path / "whole", tmp_path / "crashed")


def test_different_seeds_are_told_apart(tmp_path, data):
    """The comparison itself can fail."""
    for seed in (0, 1):
        assert runs.train(data, tmp_path / str(seed), optimizer="adamw", seed=seed, steps=4) == 0
    with pytest.raises(AssertionError):
        runs.assert_equal(tmp_path / "0", tmp_path / "1")


def test_each_checkpoint_of_a_run_leads_to_its_end(tmp_path, data):
    flags = rich("sophia-g") | {"checkpoint-interval": 1, "keep-last": 99}
    assert runs.train(data, tmp_path / "whole", **flags) == 0
    for step in (1, 4, 9):
        run = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", run)
        for later in checkpoint.steps(run / "checkpoints"):
            if later > step:
                shutil.rmtree(checkpoint.path_of(run / "checkpoints", later))
        assert runs.resume(run) == 0
        runs.assert_equal(tmp_path / "whole", run)


def test_what_a_run_draws_elsewhere_does_not_matter(tmp_path, data, monkeypatch):
    """All randomness is a function of seed, step and row: the state of torch's generators is no part of a run."""
    flags = rich("sophia-g")
    assert runs.train(data, tmp_path / "one", **flags) == 0
    runs.before_batch(monkeypatch, lambda index: torch.rand(index + 1))
    torch.manual_seed(99)
    assert runs.train(data, tmp_path / "other", **flags) == 0
    runs.assert_equal(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_the_way_on(tmp_path, data, monkeypatch, capsys, number, code):
    flags = rich("sophia-g")
    assert runs.train(data, tmp_path / "whole", **flags) == 0
    capsys.readouterr()
    runs.signal_at(monkeypatch, number, 6, 7)
    assert runs.train(data, tmp_path / "stopped", **flags) == code
    said = capsys.readouterr().out
    assert f"{number.name}: stopped after step 7 of 12" in said
    assert f"sophia train --resume {tmp_path / 'stopped'}" in said
    assert checkpoint.steps(tmp_path / "stopped" / "checkpoints")[-1] == 7
    assert runs.resume(tmp_path / "stopped") == code
    assert runs.resume(tmp_path / "stopped") == 0
    runs.assert_equal(tmp_path / "whole", tmp_path / "stopped")


def test_a_signal_during_an_evaluation_and_one_while_a_checkpoint_is_written(tmp_path, data, monkeypatch):
    assert runs.train(data, tmp_path / "whole") == 0
    evaluate, write, sent = train.evaluate, checkpoint.write, []
    writing, signalled = threading.Event(), threading.Event()

    def signalling_evaluate(*args, **kwargs):
        if not sent:
            sent.append("evaluation")
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    def slow_write(folder, checkpoint_):
        if checkpoint_.step == 5:
            writing.set()
            assert signalled.wait(timeout=60)
        return write(folder, checkpoint_)

    def act(index):
        if index == 5 and "writing" not in sent:
            sent.append("writing")
            assert writing.wait(timeout=60)
            signal.raise_signal(signal.SIGTERM)
            signalled.set()

    monkeypatch.setattr(train, "evaluate", signalling_evaluate)
    monkeypatch.setattr(checkpoint, "write", slow_write)
    runs.before_batch(monkeypatch, act)
    assert runs.train(data, tmp_path / "stopped") == 143
    assert runs.resume(tmp_path / "stopped") == 143
    assert sent == ["evaluation", "writing"]
    assert checkpoint.steps(tmp_path / "stopped" / "checkpoints") == [5, 6]
    assert runs.resume(tmp_path / "stopped") == 0
    runs.assert_equal(tmp_path / "whole", tmp_path / "stopped")


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, data, monkeypatch):
    """Four updates are done before the first checkpoint is; the next one waits for it."""
    write, reached = checkpoint.write, threading.Event()
    order = []

    def slow_write(folder, checkpoint_):
        order.append(f"begin {checkpoint_.step}")
        assert reached.wait(timeout=60)
        found = write(folder, checkpoint_)
        order.append(f"end {checkpoint_.step}")
        return found

    monkeypatch.setattr(checkpoint, "write", slow_write)
    runs.before_batch(monkeypatch, lambda index: reached.set() if index == 9 else None)
    assert runs.train(data, tmp_path / "run") == 0
    assert order == ["begin 5", "end 5", "begin 10", "end 10", "begin 12", "end 12"]


def test_a_checkpoint_is_of_its_step_however_late_it_is_written(tmp_path, data, monkeypatch):
    """It is a copy: the updates that follow do not reach it."""
    write = checkpoint.write
    assert runs.train(data, tmp_path / "whole", keep_last=9) == 0
    monkeypatch.setattr(checkpoint, "write", lambda *args: time.sleep(0.3) or write(*args))
    assert runs.train(data, tmp_path / "late", keep_last=9) == 0
    for step in (5, 10, 12):
        for name in ("model.safetensors", "optimizer.safetensors"):
            ours, theirs = (tmp_path / run / "checkpoints" / f"step-{step:08}" / name for run in ("late", "whole"))
            assert ours.read_bytes() == theirs.read_bytes()


def test_a_signal_after_the_last_step_ends_nothing_early(tmp_path, data, monkeypatch, capsys):
    evaluate = train.evaluate
    calls = []

    def evaluating(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # after the last step
            signal.raise_signal(signal.SIGINT)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(train, "evaluate", evaluating)
    assert runs.train(data, tmp_path / "run", steps=3) == 0
    assert "after 3 steps" in capsys.readouterr().out


def test_a_resume_keeps_the_micro_batch_that_auto_chose(tmp_path, data, monkeypatch, capsys):
    """Another one would give other roundings; what was free at the time decided it."""
    flags = {"micro-batch": "auto", "dropout": 0.1}
    monkeypatch.setattr(micro_batch, "largest", lambda stepper, session: 3)
    assert runs.train(data, tmp_path / "whole", **flags) == 0
    runs.signal_at(monkeypatch, signal.SIGTERM, 6)
    assert runs.train(data, tmp_path / "stopped", **flags) == 143
    monkeypatch.setattr(micro_batch, "largest", lambda stepper, session: 6)
    assert runs.resume(tmp_path / "stopped") == 0
    assert "bit for bit" not in capsys.readouterr().out
    runs.assert_equal(tmp_path / "whole", tmp_path / "stopped")


def test_a_resume_says_what_keeps_it_from_being_bitwise(tmp_path, data, monkeypatch, capsys):
    runs.signal_at(monkeypatch, signal.SIGTERM, 3)
    assert runs.train(data, tmp_path / "run") == 143
    assert runs.resume(tmp_path / "run", micro_batch=2) == 0
    assert "resumed with micro_batch 2 instead of 4: the run goes on, but not bit for bit" in capsys.readouterr().out
    assert runs.state(runs.latest(tmp_path / "run"))["conditions"]["micro_batch"] == 2


def test_what_may_change_at_a_resume_changes_nothing_that_is_learned(tmp_path, data, monkeypatch):
    assert runs.train(data, tmp_path / "whole") == 0
    moved = shutil.copytree(data, tmp_path / "moved")
    runs.signal_at(monkeypatch, signal.SIGTERM, 3)
    assert runs.train(data, tmp_path / "run") == 143
    changes = {"data": moved, "keep_last": 5, "log_interval": 2, "eval_interval": 3, "activation_checkpointing": True}
    assert runs.resume(tmp_path / "run", **changes) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (runs.latest(tmp_path / "run") / name).read_bytes() == (
            runs.latest(tmp_path / "whole") / name
        ).read_bytes()
    assert len(checkpoint.steps(tmp_path / "run" / "checkpoints")) == 4  # 4, 5, 10 and 12


def test_a_run_can_be_resumed_from_another_folder_and_after_it_was_moved(tmp_path, data, monkeypatch):
    assert runs.train(data, tmp_path / "whole") == 0
    monkeypatch.chdir(tmp_path)
    runs.signal_at(monkeypatch, signal.SIGTERM, 3)
    assert (
        runs.sophia(
            "train", "--data", "../" + str(data.relative_to(tmp_path.parent)), "--out", "a/b", *runs.arguments()
        )
        == 143
    )
    shutil.move("a/b", "c")
    monkeypatch.chdir("/")
    assert runs.resume(tmp_path / "c") == 0
    runs.assert_equal(tmp_path / "whole", tmp_path / "c")


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-k"])
def test_the_settings_of_a_run_repeat_it(tmp_path, data, optimizer):
    flags = rich(optimizer)
    assert runs.train(data, tmp_path / "first", **flags) == 0
    assert runs.sophia("train", "--config", tmp_path / "first" / "config.toml", "--out", tmp_path / "second") == 0
    runs.assert_equal(tmp_path / "first", tmp_path / "second")
    settings = read_toml(tmp_path / "first" / "config.toml")
    assert settings != TrainSettings()
    write_toml(settings, tmp_path / "again.toml")
    assert (tmp_path / "again.toml").read_bytes() == (tmp_path / "first" / "config.toml").read_bytes()
