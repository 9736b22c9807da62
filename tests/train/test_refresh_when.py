"""`refresh_when`: curvature before an update from its batch, or after one from that one's batch; and how often."""

import contextlib
import math

import pytest
import torch

from sophia.config import OptimizerSettings
from sophia.distributed import World
from sophia.model import GPT, GPTConfig
from sophia.optimizers import Optimizers
from sophia.step import Stepper
from tests.train import runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    runs.without_plots(monkeypatch)


@pytest.fixture
def estimates(monkeypatch):
    """What each estimate was made at: the first id of its rows, and the number of updates done."""
    seen = []
    refresh = Optimizers.refresh

    def spying(self, model, batch):
        (sophia,) = self.parts
        seen.append((tuple(batch.inputs[0].tolist()), int(sophia.param_groups[0]["clock"])))
        refresh(self, model, batch)

    monkeypatch.setattr(Optimizers, "refresh", spying)
    return seen


@pytest.fixture
def batches(monkeypatch):
    """The first row of every batch, in order."""
    seen = []
    gradients = Stepper.gradients

    def spying(self, inputs, targets, *, index):
        seen.append(tuple(inputs[0].tolist()))
        return gradients(self, inputs, targets, index=index)

    monkeypatch.setattr(Stepper, "gradients", spying)
    return seen


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h"])
@pytest.mark.parametrize(("steps", "interval"), [(12, 3), (12, 5), (4, 1), (3, 10)])
def test_when_and_from_which_batch(tmp_path, data, estimates, batches, optimizer, steps, interval):
    """As many estimates either way, at the same weights t = 0, k, 2k, …; after updates from the batch before."""
    for when in ("before", "after"):
        estimates.clear()
        batches.clear()
        flags = {"optimizer": optimizer, "curvature-interval": interval, "refresh-when": when, "steps": steps}
        assert runs.train(data, tmp_path / when, **flags) == 0
        times = [time for _, time in estimates]
        assert times == list(range(0, steps, interval))
        assert len(times) == math.ceil(steps / interval)
        late = 1 if when == "after" else 0
        assert [rows for rows, _ in estimates] == [batches[max(time - late, 0)] for time in times]
        state = runs.state(runs.latest(tmp_path / when))
        assert state["optimizers"][0][0]["settings"]["accepted_refreshes"] == len(times)


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h"])
def test_the_estimate_after_an_update_stands_for_the_new_weights(optimizer):
    """By hand: two updates at interval 1; the second one's curvature is of the first one's batch at its result."""
    shape = GPTConfig(vocab_size=11, context=6, layers=1, heads=2, width=8)
    chosen = {"gamma": 0.1, "curvature_rows": 2, "curvature_interval": 1, "refresh_when": "after"}
    chosen |= {"curvature_chunks": 2} if optimizer == "sophia-g" else {}
    recipe = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.0, "weight_decay": 0.1}
    model = GPT(shape, torch.Generator().manual_seed(0))
    optimizers = Optimizers(OptimizerSettings(optimizer=optimizer, **recipe, **chosen), model, seed=3)
    stepper = Stepper(
        model=model,
        optimizers=optimizers,
        here=World(rank=0, size=1, device=torch.device("cpu")),
        rows=range(4),
        total_rows=4,
        micro_batch=4,
        max_grad_norm=1.0,
        seed=0,
        autocast=contextlib.nullcontext,
    )
    first, second = torch.randint(0, 11, (2, 2, 4, 6), generator=torch.Generator().manual_seed(1))
    stepper.refresh(*first)
    assert optimizers.refreshes == 1
    stepper.refresh_after(*first)
    assert optimizers.refreshes == 1  # it is not due: no update since
    stepper.gradients(*first, index=0)
    optimizers.step()
    stepper.refresh_after(*first)
    assert optimizers.refreshes == 2
    found = [optimizers.parts[0].state[p]["hessian"].clone() for p in model.parameters()]
    stepper.refresh(*second)
    assert optimizers.refreshes == 2
    # The same estimate, made for itself: β2 is 0.
    other = Optimizers(optimizers.settings, model, seed=3)
    for group in other.parts[0].param_groups:
        group["clock"] = 1  # its noise
    other.refresh(model, stepper.curvature_batch(*first))
    for ours, p in zip(found, model.parameters(), strict=True):
        assert torch.equal(ours, other.parts[0].state[p]["hessian"])
    assert any(ours.any() for ours in found)


def test_a_refused_estimate_is_tried_again_at_once(tmp_path, data, monkeypatch, batches):
    """After the update that held everything still, and before the next one."""
    tried = []
    refresh = Optimizers.refresh

    def refusing(self, model, batch):
        (sophia,) = self.parts
        tried.append((tuple(batch.inputs[0].tolist()), int(sophia.param_groups[0]["clock"])))
        if len(tried) in (1, 2, 4):
            sophia.update_curvature([torch.full_like(p, torch.nan) for g in sophia.param_groups for p in g["params"]])
        else:
            refresh(self, model, batch)

    monkeypatch.setattr(Optimizers, "refresh", refusing)
    flags = {"curvature-interval": 4, "refresh-when": "after", "steps": 6}
    assert runs.train(data, tmp_path / "run", **flags) == 0
    assert tried == [(batches[0], 0), (batches[0], 1), (batches[1], 1), (batches[3], 4), (batches[4], 4)]


@pytest.mark.parametrize("optimizer", ["sophia-g", "sophia-h"])
@pytest.mark.parametrize("batch", [1, 3, 4, 6])
def test_a_resume_is_bit_for_bit(tmp_path, data, monkeypatch, optimizer, batch):
    """Stopped before and after estimates, with all that the study changes at once."""
    flags = {
        "optimizer": optimizer,
        "curvature-interval": 3,
        "checkpoint-interval": 3,
        "refresh-when": "after",
        "bias-correction": True,
        "gamma": "auto",
        "clip-target": 0.6,
        "eps": 1e-9,
        "dropout": 0.1,
        "steps": 8,
    }
    assert runs.train(data, tmp_path / "whole", **flags) == 0
    settings = runs.state(runs.latest(tmp_path / "whole"))["optimizers"][0][0]["settings"]
    assert (settings["eps"], settings["bias_correction"], settings["clip_target"]) == (1e-9, True, 0.6)
    assert settings["gamma"] not in (0.05, 0.01)
    runs.crash_at(monkeypatch, batch)
    runs.through_crashes(data, tmp_path / "crashed", **flags)
    runs.assert_equal(tmp_path / "whole", tmp_path / "crashed")


def test_the_clipped_fraction_is_that_of_the_update(tmp_path, data, monkeypatch):
    """By the γ that it was made with, not by the one that an estimate after it has found."""
    flags = {"curvature-interval": 3, "refresh-when": "after", "gamma": "auto", "steps": 10}
    stepped = []
    step = Optimizers.step

    def spying(self, skip=None):
        step(self, skip)
        stepped.append(self.clip_fraction())

    monkeypatch.setattr(Optimizers, "step", spying)
    assert runs.train(data, tmp_path / "run", **flags) == 0
    told = [line["clip_fraction"] for line in runs.metrics(tmp_path / "run") if "clip_fraction" in line]
    assert told == stepped
    assert not any(abs(fraction - 0.7) < 1e-3 for fraction in told[2::3])


def test_a_checkpoint_holds_the_estimate_that_follows_its_update(tmp_path, data):
    """So a resume, or a return from a spike, finds it made; the last update's would serve nobody."""
    flags = {"curvature-interval": 3, "checkpoint-interval": 3, "refresh-when": "after", "keep-last": 9}
    assert runs.train(data, tmp_path / "run", **flags) == 0
    found = []
    for folder in sorted((tmp_path / "run" / "checkpoints").iterdir()):
        settings = runs.state(folder)["optimizers"][0][0]["settings"]
        found.append((settings["clock"], settings["last_refresh"], settings["accepted_refreshes"]))
    assert found == [(3, 3, 2), (6, 6, 3), (9, 9, 4), (12, 9, 4)]
