"""A run of a study is a run of the trainer, wherever it was interrupted; and it says what it saw."""

import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sophia import checkpoint
from sophia.data.loader import Batches
from sophia.data.shards import Dataset
from sophia.guards import Signals
from sophia.metrics import read_metrics
from sophia.schedule import lr_factor
from sophia.study import one_run
from sophia.study.one_run import Stopped
from sophia.train import Trainer
from tests.study import tiny
from tests.train import runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "data")


def run(data, folder, spec, *, study=None, signals=None, report=lambda _: None, note=lambda _: None):
    return one_run.run(
        study or tiny.study(data),
        spec,
        data=data,
        fingerprint=Dataset.open(data).fingerprint,
        folder=folder / spec.id,
        signals=signals or Signals(),
        report=report,
        note=note,
    )


def untimed(finished):
    return replace(finished, seconds=0.0)


def test_it_is_what_sophia_train_does(tmp_path, data, monkeypatch):
    runs.without_plots(monkeypatch)
    spec = tiny.spec("sophia-g", beta1=0.8, seed=3)
    ours = run(data, tmp_path, spec)
    flags = {"layers": 1, "width": 16, "context": 8, "tokens_per_step": 32, "steps": 20, "warmup_steps": 2}
    flags |= {"micro_batch": None, "eval_interval": 5, "eval_windows": 4, "log_interval": 5}
    flags |= {"optimizer": "sophia-g", "lr": spec_lr(spec), "beta1": 0.8, "seed": 3}
    assert runs.train(data, tmp_path / "train", **flags) == 0
    lines = read_metrics(tmp_path / "train" / "metrics.jsonl")
    assert [point.val_loss for point in ours.curve] == [line["val_loss"] for line in lines.evaluations]
    assert [(point.step, point.tokens) for point in ours.curve] == [(s, 32 * s) for s in (0, 5, 10, 15, 20)]
    by_step = {line["step"]: line for line in lines.training}
    for point in ours.curve[1:]:
        assert (point.loss, point.clip_fraction) == tuple(by_step[point.step][n] for n in ("loss", "clip_fraction"))
    assert ours.val_loss == ours.curve[-1].val_loss
    assert ours.val_loss < ours.curve[0].val_loss
    assert 0 < ours.seconds < 60


def spec_lr(spec):
    return dict(spec.settings)["lr"]


def test_everything_of_the_study_reaches_the_trainer(data):
    study = tiny.study(data, schedule="linear", warmup_fraction=0.25, final_lr_fraction=0.2, max_grad_norm=0.5)
    spec = replace(tiny.spec("lion", steps=44, beta1=0.7), kind="lion")
    found = one_run.train_settings(study, spec, data=data, out=None)
    assert found.model == study.model
    assert found.machine == study.machine
    assert (found.schedule.schedule, found.schedule.warmup_steps, found.schedule.final_lr_fraction) == (
        "linear",
        11,
        0.2,
    )
    assert (found.schedule.steps, found.batch.tokens_per_step, found.batch.seed) == (44, 32, 1)
    assert (found.optimizer.optimizer, found.optimizer.beta1, found.optimizer.max_grad_norm) == ("lion", 0.7, 0.5)
    assert found.evaluation.eval_interval == 11
    assert found.evaluation.eval_windows == 4
    with pytest.raises(ValueError, match=r"study tiny, lion: unknown key betta1 .*did you mean beta1"):
        one_run.train_settings(study, tiny.spec("lion", betta1=0.5), data=data, out=None)


def test_evidence_is_equal_where_seed_and_batch_are(tmp_path, data):
    adamw, sophia, other = (
        run(data, tmp_path, spec).evidence
        for spec in (tiny.spec(), tiny.spec("sophia-g", curvature_interval=6), tiny.spec(seed=2))
    )
    assert (adamw.weights, adamw.batches, adamw.validation) == (sophia.weights, sophia.batches, sophia.validation)
    assert adamw.weights != other.weights
    assert adamw.batches != other.batches
    assert adamw.validation == other.validation
    assert adamw.refreshes is None
    assert sophia.refreshes == math.ceil(20 / 6)
    last = lr_factor("cosine", 19, total_steps=20, warmup_steps=2, final_fraction=0.05)
    assert adamw.last_lr_factor == pytest.approx(last)
    assert last == pytest.approx(0.05)
    wanted = {"device": "cpu", "compile": False, "precision": "float32", "threads": torch.get_num_threads()}
    assert wanted.items() <= adamw.conditions.items()
    assert adamw.conditions.keys() == {*wanted, "torch", "sophia"}


def test_curvature_of_matrices_is_in_the_evidence(tmp_path, data):
    found = run(data, tmp_path, tiny.spec("sophia-k", curvature_interval=6, gamma=0.05))
    assert found.evidence.refreshes == math.ceil(20 / 6)
    assert found.val_loss < found.curve[0].val_loss
    assert all(0.0 < point.clip_fraction < 1.0 for point in found.curve[1:])
    without = run(data, tmp_path, tiny.spec("sophia-k", factors="gradients", diagonal="gradients"))
    assert without.evidence.refreshes is None


def test_other_data_has_other_digests(tmp_path, data):
    other = runs.write_data(tmp_path / "other", seed=5)
    first = run(data, tmp_path, tiny.spec()).evidence
    second = run(other, tmp_path / "there", tiny.spec()).evidence
    assert first.batches != second.batches
    assert first.validation != second.validation
    assert first.weights == second.weights


@pytest.mark.parametrize("changed", [0, 10, 19])
def test_a_single_other_batch_is_noticed(tmp_path, data, monkeypatch, changed):
    """The first, the middle one and the last."""
    step = Batches.step

    def other(self, index, rows=None):
        return step(self, index + 100 if index == changed else index, rows)

    honest = run(data, tmp_path / "honest", tiny.spec()).evidence
    monkeypatch.setattr(Batches, "step", other)
    assert run(data, tmp_path / "other", tiny.spec()).evidence.batches != honest.batches


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-k", "adamw"])
def test_stopped_and_gone_on_with_it_is_the_same(tmp_path, data, optimizer):
    spec = tiny.spec(optimizer)
    whole = run(data, tmp_path / "whole", spec)
    signals = Signals()

    def stop(step):
        if step == 8:
            signals.received = signal.SIGTERM

    with pytest.raises(Stopped):
        run(data, tmp_path / "parts", spec, signals=signals, report=stop)
    seen = []
    assert untimed(run(data, tmp_path / "parts", spec, report=seen.append)) == untimed(whole)
    assert seen[0] == 9  # a signal is answered after the next update


def test_killed_and_gone_on_with_it_is_the_same(tmp_path, data, monkeypatch):
    """Before the first checkpoint, after one, and after the last."""
    spec = tiny.spec("sophia-g")
    whole = run(data, tmp_path / "whole", spec)
    runs.crash_at(monkeypatch, 2, 13)
    began = []

    def piece():
        seen = []
        try:
            return run(data, tmp_path / "parts", spec, report=seen.append)
        finally:
            runs.end_threads()
            began.append(seen[0])

    for _ in range(2):
        with pytest.raises(runs.Killed):
            piece()
    assert untimed(piece()) == untimed(whole)
    assert untimed(piece()) == untimed(whole)  # it ended, but nobody had noted it
    assert began == [0, 0, 10, 20]


def test_a_run_begun_with_other_settings_begins_anew(tmp_path, data):
    spec, signals = tiny.spec(), Signals()
    signals.received = signal.SIGTERM
    with pytest.raises(Stopped):
        run(data, tmp_path, spec, signals=signals)
    study = tiny.study(data, warmup_fraction=0.5)
    seen = []
    found = run(data, tmp_path, spec, study=study, report=seen.append)
    assert seen[0] == 0
    assert untimed(found) == untimed(run(data, tmp_path / "fresh", spec, study=study))


def test_half_a_folder_begins_anew(tmp_path, data):
    spec = tiny.spec()
    (tmp_path / spec.id / "checkpoints").mkdir(parents=True)
    assert run(data, tmp_path, spec).val_loss is not None


def test_divergence_is_a_result(tmp_path, data):
    notes = []
    found = run(data, tmp_path, tiny.spec(lr=1e30), note=notes.append)
    assert found.val_loss is None
    assert found.score == math.inf
    assert found.evidence is None
    assert found.curve[0].val_loss is not None
    assert found.curve[-1].val_loss is None
    assert ["left out" in note for note in notes] == [True, False]  # not a line for each of ten updates
    assert "updates in a row had a non-finite loss" in notes[1]
    assert "checkpoint" not in notes[1]


def test_a_loss_from_before_it_diverged_does_not_count(tmp_path, data):
    study = tiny.study(data, evaluations=1)
    found = run(data, tmp_path, tiny.spec(lr=1e30, steps=40), study=study)
    assert [point.step for point in found.curve] == [0]
    assert found.curve[0].val_loss is not None
    assert found.val_loss is None


def test_divergence_in_the_last_update_is_one_too(tmp_path, data, monkeypatch):
    """Too late for the guards against losses that are not finite."""
    update = Trainer.update

    def spoilt(self, inputs, targets):
        lr = update(self, inputs, targets)
        if self.progress.step == 20:
            with torch.no_grad():
                next(self.session.model.parameters())[0, 0] = math.nan
        return lr

    monkeypatch.setattr(Trainer, "update", spoilt)
    found = run(data, tmp_path, tiny.spec())
    assert found.val_loss is None
    assert found.curve[-1].step == 20
    assert found.curve[-1].val_loss is None


def test_an_error_is_no_divergence(tmp_path, data):
    with pytest.raises(ValueError, match="curvature_rows is 100"):
        run(data, tmp_path, tiny.spec("sophia-g", curvature_rows=100))


def test_data_that_changed_while_the_study_ran(tmp_path, data):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    spec = tiny.spec()
    fingerprint = Dataset.open(copy).fingerprint
    shutil.rmtree(copy)
    runs.write_data(copy, seed=8)
    with pytest.raises(ValueError, match="changed while the study ran"):
        one_run.run(
            tiny.study(copy), spec, data=copy, fingerprint=fingerprint, folder=tmp_path / "run", signals=Signals()
        )


def test_long_runs_have_checkpoints_on_the_way(tmp_path, data):
    found = []

    def look(step):
        if step == 16:
            found.extend(checkpoint.steps(Path(tmp_path) / tiny.spec().id / "checkpoints"))

    run(data, tmp_path, tiny.spec(), report=look)
    assert found
    assert set(found) <= {5, 10, 15}
