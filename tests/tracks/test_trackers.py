"""TensorBoard and Weights & Biases get what the file gets."""

import importlib.util
import math
import sys
import types

import pytest

from sophia.metrics import Metrics
from sophia.trackers import check_trackers

RECORDS = [
    {"step": 0, "tokens": 0, "val_loss": 6.0, "perplexity": 403.0},
    {"step": 1, "tokens": 64, "loss": 5.5, "clip_fraction": None, "grad_norm": math.inf},
    {"step": 2, "tokens": 128, "loss": 5.0, "clip_fraction": 0.25, "grad_norm": 1.5},
    {"step": 2, "event": "spike", "loss": 9.0},
]


def run(folder, records, names, *, resume_step=None):
    with Metrics(folder, resume_step=resume_step, track=names) as metrics:
        for record in records:
            metrics.write(record)


# ---- TensorBoard


def scalars(folder):
    """(step, value) of every curve, as TensorBoard itself reads it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}, events


@pytest.fixture
def _tensorboard():
    pytest.importorskip("tensorboard")


@pytest.mark.usefixtures("_tensorboard")
def test_tensorboard_shows_the_numbers(tmp_path):
    run(tmp_path, RECORDS, ["tensorboard"])
    curves, events = scalars(tmp_path)
    assert curves == {
        "validation/tokens": [(0, 0)],
        "validation/loss": [(0, 6)],
        "validation/perplexity": [(0, 403)],
        "train/tokens": [(1, 64), (2, 128)],
        "train/loss": [(1, 5.5), (2, 5)],
        "train/clip_fraction": [(2, 0.25)],
        "train/grad_norm": [(2, 1.5)],
    }
    (note,) = events.Tensors("events/text_summary")
    assert note.step == 2
    assert note.tensor_proto.string_val == [b"spike: loss 9.0"]


@pytest.mark.usefixtures("_tensorboard")
def test_tensorboard_forgets_what_a_resume_or_a_rollback_takes_back(tmp_path):
    run(tmp_path, [{"step": t, "loss": float(t)} for t in range(1, 9)], ["tensorboard"])
    with Metrics(tmp_path, resume_step=5, track=["tensorboard"]) as metrics:
        metrics.write({"step": 6, "loss": 60.0})
        metrics.write({"step": 7, "loss": 70.0})
        metrics.cut(3)
        metrics.write({"step": 4, "loss": 400.0})
    assert scalars(tmp_path)[0]["train/loss"] == [(1, 1), (2, 2), (3, 3), (4, 400)]


# ---- Weights & Biases


class FakeRun:
    def __init__(self, settings):
        self.settings, self.logged, self.axes, self.finished = settings, [], [], False

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    """A package of that name whose runs are kept in `runs`."""
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.Error = type("Error", (Exception,), {})
    module.Settings = lambda **settings: settings
    module.runs = []

    def init(**settings):
        module.runs.append(FakeRun(settings))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_numbers_and_the_settings(fake_wandb, tmp_path):
    (tmp_path / "config.toml").write_text("[optimizer]\nlr = 0.5\n", encoding="utf-8")
    run(tmp_path, RECORDS, ["wandb"])
    (started,) = fake_wandb.runs
    assert started.finished
    assert started.settings["config"] == {"optimizer": {"lr": 0.5}}
    assert started.settings["name"] == tmp_path.name
    assert started.settings["dir"] == str(tmp_path)
    assert ("*", "step") in started.axes
    assert started.logged == [
        {"step": 0, "validation/tokens": 0, "validation/loss": 6.0, "validation/perplexity": 403.0},
        {"step": 1, "train/tokens": 64, "train/loss": 5.5},
        {"step": 2, "train/tokens": 128, "train/loss": 5.0, "train/clip_fraction": 0.25, "train/grad_norm": 1.5},
        {"step": 2, "event": "spike: loss 9.0"},
    ]


def test_a_resumed_run_goes_on_under_its_name(fake_wandb, tmp_path):
    run(tmp_path, RECORDS, ["wandb"])
    run(tmp_path, [], ["wandb"], resume_step=1)
    first, second = (started.settings for started in fake_wandb.runs)
    assert first["id"] == second["id"]
    assert (first["resume"], second["resume"]) == (None, "allow")
    other = tmp_path / "other"
    other.mkdir()
    run(other, RECORDS, ["wandb"])
    assert fake_wandb.runs[-1].settings["id"] != first["id"]


def test_wandb_that_cannot_start_is_one_line_and_closes_the_others(fake_wandb, tmp_path):
    def refuse(**settings):
        raise fake_wandb.Error("no API key\nconfigured")

    fake_wandb.init = refuse
    with pytest.raises(ValueError, match=r"wandb cannot start: no API key configured; .*WANDB_MODE=offline"):
        Metrics(tmp_path, resume_step=None, track=["wandb"])


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_itself_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(tmp_path, RECORDS, ["wandb"])
    run(tmp_path, RECORDS[2:], ["wandb"], resume_step=1)
    name = (tmp_path / "wandb-id.txt").read_text(encoding="utf-8").strip()
    files = list(tmp_path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 2
    content = b"".join(file.read_bytes() for file in files)
    assert b"validation/perplexity" in content
    assert b"spike: loss 9.0" in content


# ---- names


def test_unknown_and_missing_trackers_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no tracker 'tensorbord'; there are tensorboard, wandb"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(ValueError, match=rf"pip install 'sophia-lm\[{name}\]'"):
            Metrics(tmp_path, resume_step=None, track=[name])


def test_a_tracker_named_twice_is_one(fake_wandb, tmp_path):
    run(tmp_path, RECORDS, ["wandb", "wandb"])
    assert len(fake_wandb.runs) == 1
