"""The demo's search: its rule on made-up losses, and that the demo's settings are the best of the committed search."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from sophia import sweep
from sophia.race import AdamWRecipe, RaceSettings, SophiaGRecipe

ROOT = Path(__file__).parents[1]


OTHERS = {AdamWRecipe: ("beta2", 0.9), SophiaGRecipe: ("gamma", 0.5)}  # the best values of the other settings


def made_up(optimum):
    """Trials whose loss is least at a learning rate and another setting for each optimizer."""

    def trial(recipe):
        name, value = OTHERS[type(recipe)]
        loss = 1 + math.log2(recipe.lr / optimum[type(recipe)]) ** 2 + (getattr(recipe, name) - value) ** 2
        return sweep.Trial(recipe=recipe, loss=loss, clip_fraction=0.5 if isinstance(recipe, SophiaGRecipe) else None)

    return lambda recipes: [trial(recipe) for recipe in recipes]


@pytest.mark.parametrize("adamw_rate", [1e-3, 4e-3, 16e-3, 64e-3])
@pytest.mark.parametrize("sophia_rate", [0.5e-3, 2e-3, 8e-3])
def test_both_get_the_same_number_of_trials_and_an_inner_optimum(adamw_rate, sophia_rate):
    run = made_up({AdamWRecipe: adamw_rate, SophiaGRecipe: sophia_rate})
    trials = sweep.search(sweep.SEARCHES, run)
    counts = {}
    for kind, rate in ((AdamWRecipe, adamw_rate), (SophiaGRecipe, sophia_rate)):
        own = [trial for trial in trials if type(trial.recipe) is kind]
        counts[kind] = len(own)
        rates = sorted(trial.recipe.lr for trial in own)
        assert rates[0] < sweep.best(own).recipe.lr < rates[-1]
        assert sweep.best(own).recipe.lr == pytest.approx(rate)
        assert len({trial.recipe for trial in own}) == len(own)
    assert counts[AdamWRecipe] == counts[SophiaGRecipe]
    for kind, (name, value) in OTHERS.items():
        assert getattr(sweep.best([t for t in trials if isinstance(t.recipe, kind)]).recipe, name) == value


def test_the_report_names_every_trial_and_the_best(tmp_path):
    run = made_up({AdamWRecipe: 4e-3, SophiaGRecipe: 2e-3})
    trials = sweep.search(sweep.SEARCHES, run)
    trials.append(sweep.Trial(recipe=AdamWRecipe(lr=9.0), loss=math.inf, clip_fraction=None))
    results, page = sweep.write(RaceSettings(), trials, "abc", tmp_path)
    loaded = json.loads(results.read_text())
    assert len(loaded["trials"]) == len(trials)
    assert loaded["trials"][-1]["val_loss"] is None
    assert loaded["text_sha256"] == "abc"
    text = page.read_text()
    assert text.count("**1.0000**") == 2
    assert "diverged" in text


def test_the_demo_runs_with_the_best_of_the_committed_search():
    search = json.loads((ROOT / "benchmarks/results/demo-sweep.json").read_text())
    assert search["settings"] == dataclasses.asdict(RaceSettings()), "the race was changed after the search"
    page = (ROOT / "docs/demo-sweep.md").read_text()
    assert page == sweep.markdown(search), "the page does not show the committed search"
    counts = set()
    for recipe in (AdamWRecipe(), SophiaGRecipe()):
        own = [trial for trial in search["trials"] if trial["optimizer"] == recipe.name]
        counts.add(len(own))
        best = min(own, key=lambda trial: trial["val_loss"] or math.inf)
        defaults = dataclasses.asdict(recipe)
        assert {**defaults, **best["settings"]} == defaults
        rates = sorted(trial["settings"]["lr"] for trial in own)
        assert rates[0] < recipe.lr < rates[-1], "the optimum lies on the edge of the grid"
    assert len(counts) == 1, "the optimizers had different numbers of trials"
