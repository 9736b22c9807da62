"""Each classic mistake of optimizer comparisons, planted, and the judge refuses or flags it (docs/protocol.md)."""

import dataclasses
import itertools
import math
import subprocess
from dataclasses import replace

import pytest

from sophia.data.shards import Dataset
from sophia.guards import Signals
from sophia.study import lock, read, results
from sophia.study.one_run import run
from sophia.study.plan import plan
from sophia.study.runs import settings
from tests.study import tiny
from tests.study.example import CONTEXT, WORTH, Example, loss_of, study_of
from tests.study.simulated import simulate
from tests.train.runs import write_data


@pytest.fixture
def example():
    return Example()


def refused(example):
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as problem:
        example.results()
    return str(problem.value)


def flagged(example, *words):
    return [flag for flag in example.results()["flags"] if all(word in flag for word in words)]


def test_an_honest_study_is_not_refused(example):
    assert example.results()["complete"]


# What runs saw.


def test_unequal_batches(example):
    """Another batch size under the same name: other text at every step."""
    spec = example.cell("muon").finals[1]
    example.bend(spec, evidence_batches="another batch size")
    message = refused(example)
    assert "different training batches" in message
    assert spec.id in message
    assert "muon, seed 2" in message
    assert "remove the line" in message


def test_another_order_of_the_data(example):
    """The batches of another seed: as many texts, easier or harder ones."""
    first, second = example.cell("sophia-g").finals[:2]
    example.bend(first, evidence_batches=example.finished[second.id].evidence.batches)
    assert "different training batches" in refused(example)


def test_a_batch_size_of_its_own_is_no_mistake_but_another_row(example):
    """Runs at other batch sizes have other batches, by right."""
    digests = {run.evidence.batches for run in example.finished.values() if run.spec.seed == 1}
    assert len(digests) > 1
    example.results()


def test_other_initial_weights(example):
    spec = example.cell("sophia-g").finals[0]
    example.bend(spec, evidence_weights="other")
    message = refused(example)
    assert "different initial weights" in message
    assert spec.id in message


def test_other_evaluation_windows(example):
    spec = example.cell("lion").trials[0].spec
    example.bend(spec, evidence_validation="other")
    assert "different validation windows" in refused(example)


@pytest.mark.parametrize(("name", "value"), [("precision", "bfloat16"), ("compile", True), ("device", "NVIDIA H200")])
def test_other_conditions(example, name, value):
    spec = example.cell("soap").finals[0]
    conditions = {**example.finished[spec.id].evidence.conditions, name: value}
    example.bend(spec, evidence_conditions=conditions)
    message = refused(example)
    assert f"conditions: {name}" in message
    assert str(value) in message


def test_a_loss_without_evidence(example):
    """Somebody else's number."""
    spec = example.cell("muon").finals[2]
    example.bend(spec, evidence=None)
    message = refused(example)
    assert "nothing says what it saw" in message
    assert spec.id in message


def test_another_version_of_torch_is_told(example):
    spec = example.cell("soap").finals[0]
    conditions = {**example.finished[spec.id].evidence.conditions, "torch": "2.14.0"}
    example.bend(spec, evidence_conditions=conditions)
    assert flagged(example, "torch", "2.13.0, 2.14.0")
    assert example.results()["machine"]["conditions"]["torch"] == ["2.13.0", "2.14.0"]


# Schedules.


def test_a_shared_schedule_cut_short(example):
    """The budget T/2 as the middle of a run of length T: the learning rate has not fallen."""
    spec = example.cell("adamw", 0.5).finals[0]
    example.bend(spec, evidence_last_lr_factor=0.55)
    message = refused(example)
    assert "0.55 of the peak instead of 0.05" in message
    assert spec.id in message


def test_a_point_in_the_middle_of_the_curve(example):
    spec = example.cell("sophia-g").finals[0]
    middle = example.finished[spec.id].curve[:6]
    example.bend(spec, curve=middle, val_loss=middle[-1].val_loss)
    assert f"ends at step {middle[-1].step}" in refused(example)


def test_the_best_loss_on_the_way_instead_of_the_last(example):
    spec = example.cell("sophia-g").finals[0]
    example.bend(spec, val_loss=2.0)
    assert "is not the" in refused(example)


def test_another_final_learning_rate(example):
    spec = example.cell("adamw").finals[0]
    example.bend(spec, evidence_last_lr_factor=0.1)
    assert "its last learning rate was 0.1 of the peak" in refused(example)


# Curvature.


def test_forgotten_refreshes(example):
    """Sign momentum under Sophia's name."""
    spec = example.cell("sophia-g").finals[0]
    example.bend(spec, evidence_refreshes=1)
    message = refused(example)
    assert "1 curvature estimates in 512 steps, where an interval of 10 makes 52" in message
    example.bend(spec, evidence_refreshes=None)
    assert "0 curvature estimates" in refused(example)


def test_more_refreshes_than_the_settings_say(example):
    example.bend(example.cell("sophia-h").finals[0], evidence_refreshes=512)
    assert "512 curvature estimates" in refused(example)


def test_an_estimate_that_was_refused_is_told(example):
    spec = example.cell("sophia-g").finals[0]
    example.bend(spec, evidence_refreshes=51)
    assert flagged(example, "not finite", f"1 of 52 ({spec.id})")


def test_one_lost_estimate_of_a_short_run_is_no_dead_end():
    """The run, made again, would lose it again."""
    example = Example(study=study_of(tokens=400 * 2048, headline_budgets=(1.0,)))
    spec = example.cell("sophia-g").finals[0]
    example.bend(spec, evidence_refreshes=39)
    assert flagged(example, f"1 of 40 ({spec.id})")
    example.bend(spec, evidence_refreshes=38)
    assert "38 curvature estimates" in refused(example)


def put_cost(example, name, **changes):
    example.costs = [replace(one, **changes) if one.optimizer == name else one for one in example.costs]


def test_a_forgotten_cost_of_curvature(example):
    put_cost(example, "sophia-g", refreshes_per_round=0)
    message = refused(example)
    assert "the timing of sophia-g holds 0 curvature estimates in 10 steps" in message
    assert "delete timing.json" in message


def test_steps_between_two_refreshes_timed_alone(example):
    put_cost(example, "sophia-g", steps_per_round=30, refreshes_per_round=2)
    assert "an interval of 10 makes 3" in refused(example)


def test_operations_without_those_of_curvature(example):
    (adamw,) = [one for one in example.costs if one.optimizer == "adamw" and one.tokens_per_step == 2048]
    put_cost(example, "sophia-h", flops_per_step=adamw.flops_per_step)
    assert "curvature is not in it" in refused(example)


@pytest.mark.parametrize("baseline", ["sophia-g", "soap"])
def test_a_baseline_whose_own_operations_count(baseline):
    """Against curvature, or eigenvectors, fewer operations are no mistake."""
    example = Example(study=study_of(baseline=baseline, headline="muon"))
    put_cost(example, "soap", flops_per_step=2e10)
    assert example.results()["complete"]


def test_a_timing_with_other_settings(example):
    (cost,) = [one for one in example.costs if one.optimizer == "sophia-h" and one.tokens_per_step == 2048]
    cheaper = settings(**{**dict(cost.settings), "curvature_interval": 100})
    put_cost(example, "sophia-h", settings=cheaper, steps_per_round=100)
    message = refused(example)
    assert "curvature_interval 100" in message
    assert "delete timing.json" in message


def test_another_learning_rate_costs_the_same(example):
    (cost,) = [one for one in example.costs if one.optimizer == "muon"]
    put_cost(example, "muon", settings=settings(**{**dict(cost.settings), "lr": 1.0}))
    example.results()


def test_a_busy_machine(example):
    (cost,) = [one for one in example.costs if one.optimizer == "muon"]
    put_cost(example, "muon", ratio_low=0.8 * cost.ratio, ratio_high=1.3 * cost.ratio, rounds=4)
    assert flagged(example, "busy", "muon")
    assert flagged(example, "4 rounds")


def test_a_cost_that_no_round_may_hold_is_told(example):
    """A hook that acts in every hundredth step, timed in rounds of ten: the median over rounds knows nothing of it."""
    assert not flagged(example, "less often")
    entries = [replace(one, hook="mine:hook") if one.name == "muon" else one for one in example.study.optimizers]
    example.study = replace(example.study, optimizers=tuple(entries))
    assert flagged(example, "muon", "rounds of 10 steps", "what muon+mine:hook does less often")


# Searches.


def test_an_optimum_on_the_edge():
    """A baseline whose learning rates all lie too low: the search walks on; where trials end first, it is told."""
    low = [replace(one, lr=one.lr / 64) if one.name == "adamw" else one for one in study_of().optimizers]
    study = replace(study_of(trials=4), optimizers=tuple(low[:2]), ablations=())
    study = replace(study, race=replace(study.race, headline="", headline_seeds=(), other_batches=()))
    finished = simulate(study, loss_of)
    found = results.build(study, plan(study, finished), finished, [], CONTEXT)
    assert [flag for flag in found["flags"] if "adamw at 1.049 million tokens" in flag and "highest" in flag]
    assert found["optimizers"]["adamw"]["searches"][0]["edges"]

    patient = replace(study, race=replace(study.race, trials=12))
    finished = simulate(patient, loss_of)
    found = results.build(patient, plan(patient, finished), finished, [], CONTEXT)
    assert not found["optimizers"]["adamw"]["searches"][0]["edges"]
    assert found["optimizers"]["adamw"]["best"]["lr"] == pytest.approx(4e-3, rel=0.5)


def test_an_under_tuned_baseline_is_named_with_its_edge(example):
    cell = example.cell("adamw")
    example.put(cell, edges=("lr 0.0006 is the highest tried",))
    assert flagged(example, "adamw at 1.049 million tokens", "lr 0.0006 is the highest tried")


def test_unequal_numbers_of_trials(example):
    cell = example.cell("sophia-g")
    example.put(cell, trials=cell.trials + cell.trials[:1])
    assert flagged(example, "different numbers of trials", "adamw 5", "sophia-g 6")


def test_settings_that_were_not_searched_are_named(example):
    assert flagged(example, "over the learning rate alone", "adamw", "sophia-g")
    assert flagged(example, "keep the learning rate of their entry", "random signs")


def test_runs_of_an_earlier_form_of_the_study_stay_visible(example):
    """Searching again until it looks good leaves its traces."""
    spec = example.cell("sophia-g").trials[0].spec
    earlier = replace(spec, settings=settings(lr=0.123))
    example.finished[earlier.id] = replace(example.finished[spec.id], spec=earlier)
    assert flagged(example, "earlier form of the study", "sophia-g 1")
    assert [run["role"] for run in example.results()["runs"] if run["id"] == earlier.id] == ["other"]


# Claims.


def test_no_claim_when_the_interval_holds_one():
    found = Example(worth={**WORTH, "sophia-g": 1.001}).results()
    one = found["optimizers"]["sophia-g"]
    assert one["speedup_tokens"]["low"] <= 1.0 <= one["speedup_tokens"]["high"]
    assert one["claim"] is False
    assert found["verdict"].startswith("No saving shown")


def test_one_lucky_seed_is_no_claim(example):
    """1.3 times with one seed, and nothing about the others."""
    example = Example(study=study_of(seeds=(1,), headline_seeds=(), other_batches=()), worth={**WORTH, "sophia-g": 1.3})
    one = example.results()["optimizers"]["sophia-g"]
    assert one["speedup_tokens"]["value"] > 1.2
    assert one["speedup_tokens"]["low"] is None
    assert one["claim"] is False
    assert flagged(example, "1 seed, fewer than 6")
    beyond = Example(study=example.study, worth={**WORTH, "sophia-g": 40.0}).results()["optimizers"]["sophia-g"]
    assert beyond["speedup_seconds"]["bound"] == "at least"
    assert (beyond["claim"], beyond["claim_seconds"]) == (False, False)


def test_beyond_the_range_there_is_no_extrapolation():
    example = Example(worth={**WORTH, "sophia-g": 40.0, "lion": 0.01})
    found = example.results()
    best, worst = found["optimizers"]["sophia-g"], found["optimizers"]["lion"]
    assert (best["speedup_tokens"]["bound"], best["speedup_tokens"]["value"]) == ("at least", pytest.approx(4.0))
    assert (worst["speedup_tokens"]["bound"], worst["speedup_tokens"]["value"]) == ("at most", pytest.approx(0.5))
    assert best["speedup_tokens"]["low"] is best["speedup_tokens"]["high"] is None
    assert flagged(example, "sophia-g", "below all", "at least 4", "without an interval")
    assert flagged(example, "lion", "above all", "at most 0.5")
    assert flagged(example, "sophia-g at its best batch", "at least 4")


def test_a_baseline_that_does_not_fall():
    """AdamW's run of 2 T, tuned badly, would make everybody look fast."""

    def loss(spec, worth):
        bad = spec.optimizer == "adamw" and spec.steps == 1024 and spec.tokens_per_step == 2048
        return loss_of(spec, worth) + (0.4 if bad else 0.0)

    example = Example(loss=loss)
    assert flagged(example, "adamw's loss does not fall", "1.049 million to 2.097 million")


def test_few_seeds_and_no_best_batch_are_told():
    example = Example(study=study_of(headline_seeds=(), other_batches=()))
    assert flagged(example, "3 seeds, fewer than 6")
    assert flagged(example, "no row with each at its best batch")


# The study file.


def test_a_study_file_that_was_not_committed(example):
    example.context = replace(CONTEXT, committed=False)
    assert flagged(example, "not committed")
    example.context = replace(CONTEXT, committed=None)
    assert flagged(example, "no git repository")


def test_a_study_file_changed_after_the_first_run_under_test(tmp_path):
    """What is frozen is refused; what is told to have been committed is told as it was at that moment."""
    study = study_of()
    held = lock.take(tmp_path, read.frozen(study), "data", begun=False)
    file = tmp_path / "study.toml"
    file.write_text("x = 1")
    for words in (
        ["init", "-q"],
        ["add", "study.toml"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm1"],
    ):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert lock.note_test(tmp_path, held, file).committed is True
    easier = replace(study, race=replace(study.race, tokens=study.race.tokens // 2))
    with pytest.raises(ValueError, match=r"race\.tokens"):
        lock.take(tmp_path, read.frozen(easier), "data", begun=True)
    weaker = tuple(replace(one, lr=one.lr / 8) if one.name == "adamw" else one for one in study.optimizers)
    with pytest.raises(ValueError, match=r"baseline\.lr"):
        lock.take(tmp_path, read.frozen(replace(study, optimizers=weaker)), "data", begun=True)
    file.write_text("x = 2")
    again = lock.take(tmp_path, read.frozen(study), "data", begun=True)
    assert lock.note_test(tmp_path, again, file).committed is True  # when it started, it was
    assert lock.note_test(tmp_path, replace(again, tested=False), file).committed is False


# The same mistakes in runs of the real trainer.


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Every run of a tiny study, made by the trainer where it counts and simulated where it only chooses."""
    folder = tmp_path_factory.mktemp("real")
    data = write_data(folder / "data")
    study = tiny.study(data, baseline_budgets=(1.0,), seeds=(1,))

    fingerprint = Dataset.open(data).fingerprint
    folders = (folder / f"run-{number}" for number in itertools.count())

    def make(spec, study=study):
        where = next(folders)
        return run(study, spec, data=data, fingerprint=fingerprint, folder=where, signals=Signals())

    finished = simulate(
        study, lambda spec: math.log(float(str(dict(spec.settings)["lr"])) / tiny.LR[spec.optimizer]) ** 2
    )
    state = plan(study, finished)
    finals = [spec for cell in state.cells for spec in cell.finals]
    made = {spec.id: make(spec) for spec in finals}
    return study, finished, finals, made, make


def judged(study, finished, made):
    """The judge's results, with the real runs' word for what was seen in the simulated searches, too."""
    (seen, *_) = [run.evidence for run in made.values()]
    shared = {"validation": seen.validation, "conditions": seen.conditions}
    runs = {
        key: replace(run, evidence=replace(run.evidence, **shared)) if run.evidence else run
        for key, run in finished.items()
    }
    runs |= made
    return results.build(study, plan(study, runs), runs, [], CONTEXT)


def test_real_runs_agree(real):
    study, finished, finals, made, _ = real
    assert {spec.optimizer for spec in finals} == {"adamw", "sophia-g"}
    assert judged(study, finished, made)["optimizers"]["sophia-g"]["final_loss"]["n"] == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"final_lr_fraction": 0.5}, "its last learning rate was 0.5 of the peak"),
        ({"eval_windows": 3}, "different validation windows"),
    ],
    ids=["another final learning rate", "other windows"],
)
def test_a_real_run_by_other_rules(real, change, says):
    study, finished, finals, made, make = real
    spec = next(spec for spec in finals if spec.optimizer == "sophia-g")
    other = replace(study, race=replace(study.race, **change))
    with pytest.raises(ValueError, match=says):
        judged(study, finished, {**made, spec.id: make(spec, study=other)})


def test_a_real_run_with_the_seed_of_another(real):
    study, finished, finals, made, make = real
    spec = next(spec for spec in finals if spec.optimizer == "sophia-g")
    lucky = dataclasses.replace(make(replace(spec, seed=7)), spec=spec)
    with pytest.raises(ValueError, match="different initial weights"):
        judged(study, finished, {**made, spec.id: lucky})


def test_a_real_run_of_twice_the_length_is_no_point_of_this_one(real):
    study, finished, finals, made, make = real
    spec = next(spec for spec in finals if spec.optimizer == "sophia-g")
    long = make(replace(spec, steps=2 * spec.steps))
    half = tuple(point for point in long.curve if point.step <= spec.steps)
    cut = replace(long, spec=spec, curve=half, val_loss=half[-1].val_loss)
    with pytest.raises(ValueError, match=r"different training batches|curvature estimates"):
        judged(study, finished, {**made, spec.id: cut})
