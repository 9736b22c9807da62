"""The race and what the demo shows of it, on a small scale."""

import json
import math

import pytest
import torch

from sophia import demo
from sophia.race import AdamWRecipe, RaceSettings, Run, SophiaGRecipe, Validation, prepare_text, race, start_runs
from tests.pictures import is_picture

TINY = {
    "steps": 12,
    "batch_size": 4,
    "context": 32,
    "layers": 1,
    "heads": 1,
    "width": 16,
    "vocab_size": 300,
    "text_bytes": 900_000,
    "validation_windows": 8,
    "validation_interval": 5,
    "validation_fraction": 0.3,
}


@pytest.fixture(scope="module")
def text():
    return prepare_text(RaceSettings(**TINY))


@pytest.fixture(scope="module")
def finished(text):
    settings = RaceSettings(**TINY)
    runs = start_runs(settings, [AdamWRecipe(), SophiaGRecipe(curvature_rows=4)])
    steps = list(race(settings, runs, text))
    assert steps == list(range(13))
    return runs


def test_runs_start_from_the_same_weights_and_loss(finished):
    adamw, sophia = finished
    assert adamw.validations[0].loss == sophia.validations[0].loss
    assert adamw.losses[0] == sophia.losses[0]  # the same first batch
    assert adamw.losses[1] != sophia.losses[1]


def test_runs_are_measured_at_the_same_steps(finished):
    for run in finished:
        assert [point.step for point in run.validations] == [0, 5, 10, 12]
        assert len(run.losses) == 12
        assert run.seconds > 0
        assert run.final_loss < run.validations[0].loss
    assert len(finished[1].clip_fractions) == 3
    assert all(0 <= fraction <= 1 for fraction in finished[1].clip_fractions)


def test_a_run_does_not_depend_on_who_runs_beside_it(finished, text):
    settings = RaceSettings(**TINY)
    (alone,) = runs = start_runs(settings, [SophiaGRecipe(curvature_rows=4)])
    for _ in race(settings, runs, text):
        pass
    assert alone.losses == finished[1].losses


def test_vectors_are_not_decayed(finished):
    matrices, vectors = finished[1].optimizer.param_groups
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert all(p.ndim < 2 for p in vectors["params"])
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.2, 0.0)


def made_up(recipe, losses, seconds_a_step=1.0):
    run = Run(recipe=recipe, model=None, optimizer=None)
    run.losses = list(losses)
    run.validations = [Validation(step=i, seconds=i * seconds_a_step, loss=loss) for i, loss in enumerate(losses)]
    run.seconds = seconds_a_step * (len(losses) - 1)
    return run


def test_the_verdict_says_who_was_ahead():
    slow, fast = [5.0, 4.0, 3.5, 3.0, 2.9], [5.0, 3.0, 2.8, 2.7, 2.6]
    ahead = demo.verdict([made_up(AdamWRecipe(), slow), made_up(SophiaGRecipe(), fast, 2.0)])
    assert ahead.startswith("Sophia-G ended 0.300 nats below AdamW; it had AdamW's final loss after 40% of the steps")
    assert "100% of the seconds" in ahead
    behind = demo.verdict([made_up(AdamWRecipe(), fast), made_up(SophiaGRecipe(), slow)])
    assert behind.startswith("AdamW ended 0.300 nats below Sophia-G, and had Sophia-G's final loss after 40%")
    lost = demo.verdict([made_up(AdamWRecipe(), fast), made_up(SophiaGRecipe(), [5.0, math.nan])])
    assert lost.startswith("Sophia-G diverged")
    for sentence in (ahead, behind, lost):
        assert "One seed" in sentence


def test_a_diverged_run_stops_and_the_other_goes_on(text):
    settings = RaceSettings(**TINY)
    runs = start_runs(settings, [AdamWRecipe(), AdamWRecipe(lr=1e-3)])
    with torch.no_grad():
        next(runs[0].model.parameters()).fill_(math.nan)
    for _ in race(settings, runs, text):
        pass
    assert runs[0].diverged
    assert len(runs[0].losses) == 1
    assert len(runs[1].losses) == 12


def test_the_demo_leaves_a_table_a_picture_and_samples(tmp_path, capsys):
    demo.demo(demo.DemoSettings(race=RaceSettings(**TINY), out=tmp_path / "out"))
    shown = capsys.readouterr().out
    for word in ("step 12/12", "AdamW", "Sophia-G", "final validation", "clipped", "One seed", "race.png"):
        assert word in shown
    assert is_picture(tmp_path / "out" / "race.png")
    sample = (tmp_path / "out" / "sample.txt").read_text()
    assert sample.count("---") == 4
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [run["optimizer"] for run in results["runs"]] == ["AdamW", "Sophia-G"]
    assert results["machine"]["torch"] == torch.__version__
    assert results["verdict"] in " ".join(shown.split()) or results["verdict"][:40] in shown


def test_live_bars_on_a_terminal(text, monkeypatch):
    from rich.console import Console

    settings = RaceSettings(**TINY)
    runs = start_runs(settings, [AdamWRecipe(), SophiaGRecipe(curvature_rows=4)])
    console = Console(force_terminal=True, width=140, record=True)
    demo._watch(settings, runs, text, console)
    shown = console.export_text()
    assert "AdamW" in shown
    assert "12/12" in shown
    assert "tok/s" in shown
    assert "clipped" in shown
