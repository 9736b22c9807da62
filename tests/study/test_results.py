"""results.json from studies whose truth is known, whole and in every state before; and the verdict in words."""

import json
import math
from dataclasses import replace

import pytest

from sophia.study import results, timing
from sophia.study.measured import Cost
from sophia.study.plan import plan
from sophia.study.runs import settings
from tests.study.example import CONTEXT, PRICE, STEP, TOKENS, WORTH, Example, loss_of, study_of
from tests.study.simulated import simulate

ESTIMATE = {"value", "low", "high", "n", "bound"}
OPTIMIZER = {
    *("optimizer", "best", "final_loss", "speedup_tokens", "speedup_seconds", "speedup_flops", "claim", "cost"),
    *("trials", "searches", "paper_test", "best_batch", "clip_fraction"),
}
STUDY = {
    *("name", "about", "text", "text_sha256", "fingerprint", "tokens", "tokens_per_step", "steps", "context", "model"),
    *("schedule", "budgets", "seeds", "headline_seeds", "search_seed", "trials", "retrials", "factor", "file"),
    *("file_sha256", "committed"),
}


@pytest.fixture(scope="module")
def whole():
    return Example().results()


def test_the_form_is_the_one_that_the_report_reads(whole):
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    assert set(whole) == {
        *("study", "machine", "baseline", "headline", "verdict", "complete", "optimizers", "baseline_curve"),
        *("duels", "ablations", "runs", "flags"),
    }
    assert set(whole["study"]) >= STUDY
    assert whole["study"]["model"] == {
        **whole["study"]["model"],
        "model": "nano",
        "layers": 4,
        "context": 128,
        "parameters": 1_234_560,
        "vocab_size": 1024,
    }
    assert whole["study"]["budgets"] == [TOKENS // 2, TOKENS, 2 * TOKENS, 4 * TOKENS]
    assert whole["study"]["schedule"]["kind"] == "cosine"
    assert list(whole["optimizers"]) == list(WORTH)
    for one in whole["optimizers"].values():
        assert set(one) >= OPTIMIZER
        assert set(one["speedup_tokens"]) == set(one["speedup_seconds"]) == set(one["speedup_flops"]) == ESTIMATE
        assert set(one["final_loss"]) == {"mean", "low", "high", "n"}
    assert whole["complete"]
    assert whole["machine"]["conditions"]["device"] == "cpu"


def test_speedups_are_the_truth_that_was_put_in(whole):
    for name, one in whole["optimizers"].items():
        assert one["speedup_tokens"]["value"] == pytest.approx(WORTH[name], rel=0.04)
        n = 6 if name in ("adamw", "sophia-g") else 3
        assert one["speedup_tokens"]["n"] == one["final_loss"]["n"] == n
        assert one["speedup_tokens"]["bound"] is None


def test_the_baseline_against_itself_is_one(whole):
    adamw = whole["optimizers"]["adamw"]
    for currency in ("tokens", "seconds", "flops"):
        assert adamw[f"speedup_{currency}"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 6, "bound": None}
    assert not adamw["claim"]
    assert not adamw["claim_seconds"]


def test_time_and_operations_divide_by_what_a_token_costs(whole):
    soap = whole["optimizers"]["soap"]
    tokens, seconds = soap["speedup_tokens"], soap["speedup_seconds"]
    assert seconds["value"] == pytest.approx(tokens["value"] / PRICE["soap"])
    assert math.log(seconds["high"] / seconds["low"]) > math.log(tokens["high"] / tokens["low"])
    assert (soap["claim"], soap["claim_seconds"]) == (True, False)  # 1.3 the tokens at 1.25 the price
    sophia = whole["optimizers"]["sophia-g"]
    assert sophia["speedup_flops"]["value"] == pytest.approx(sophia["speedup_tokens"]["value"] / 1.006)


def test_the_headline_is_held_against_each_of_the_others(whole):
    """What both owe to the baseline's luck, and to a slow round, drops out of how far one is ahead of the other."""
    duels = {one["optimizer"]: one for one in whole["duels"]}
    assert list(duels) == [name for name in WORTH if name not in ("adamw", "sophia-g")]
    sophia = whole["optimizers"]["sophia-g"]
    for name, one in duels.items():
        assert set(one["speedup_tokens"]) == set(one["speedup_seconds"]) == ESTIMATE
        assert one["speedup_tokens"]["value"] == pytest.approx(WORTH["sophia-g"] / WORTH[name], rel=0.04)
        price = sophia["cost"]["ratio"] / whole["optimizers"][name]["cost"]["ratio"]
        for end in ("value", "low", "high"):
            assert one["speedup_seconds"][end] == pytest.approx(one["speedup_tokens"][end] / price)
    assert duels["muon"]["claim"]
    assert duels["muon"]["speedup_tokens"]["value"] < 1


def test_without_a_rival_there_is_no_duel():
    assert (
        Example(study=replace(Example().study, race=replace(Example().study.race, headline=""))).results()["duels"]
        == []
    )


def test_the_papers_test_is_half_the_budget_against_the_whole(whole):
    found = whole["optimizers"]["sophia-g"]["paper_test"]
    assert found["tokens"] == TOKENS // 2
    assert found["difference"]["n"] == 6
    truth = 1.5 * ((0.5 * WORTH["sophia-g"]) ** -0.15 - 1)
    assert found["difference"]["value"] == pytest.approx(truth, abs=0.01)
    assert found["difference"]["low"] > 0
    assert whole["optimizers"]["muon"]["paper_test"] is None


def test_every_run_is_listed_with_its_role_and_price(whole):
    example = Example()
    roles = [run["role"] for run in whole["runs"]]
    assert len(roles) == len(example.finished)
    assert roles.count("final") == sum(len(cell.finals) for cell in example.plan.cells)
    assert {run["ablation"] for run in whole["runs"] if run["role"] == "ablation"} == {
        one.name for one in example.study.ablations
    }
    by_id = {run["id"]: run for run in whole["runs"]}
    for cell in example.plan.cells:
        for spec in cell.finals:
            if cell.tokens_per_step == STEP:
                cost = whole["optimizers"][cell.optimizer]["cost"]
                assert by_id[spec.id]["seconds"] == pytest.approx(cost["seconds_per_step"] * spec.steps)
                assert by_id[spec.id]["flops"] == pytest.approx(cost["flops_per_step"] * spec.steps)
    assert set(by_id[spec.id]["curve"][0]) == {"step", "tokens", "val_loss", "loss", "clip_fraction"}


def test_ablations_are_differences_by_seed(whole):
    found = {one["name"]: one for one in whole["ablations"]}
    slow = found["interval 100"]
    assert slow["settings"] == {"curvature_interval": 100}
    assert slow["difference"]["value"] == pytest.approx(0.02, abs=0.01)
    assert slow["difference"]["n"] == 3
    assert slow["searched"]
    assert not found["random signs"]["searched"]
    assert found["interval 1"]["cost"]["ratio"] > whole["optimizers"]["sophia-g"]["cost"]["ratio"]
    # What costs the same is not timed again.
    assert found["gamma 1"]["cost"] == whole["optimizers"]["sophia-g"]["cost"]


def test_settings_that_are_lists_are_plain_values():
    entries = study_of().optimizers[:2]
    listed = replace(entries[1], settings=settings(arguments=["rank=4", "nesterov=True"]))
    study = replace(study_of(headline="", headline_seeds=(), other_batches=()), optimizers=(entries[0], listed))
    found = Example(study=replace(study, ablations=())).results()
    assert json.loads(json.dumps(found)) == found
    assert found["optimizers"]["lion"]["best"]["arguments"] == ["rank=4", "nesterov=True"]


def test_without_a_timing_there_is_no_time_and_nothing_is_complete():
    example = Example()
    example.costs = []
    found = example.results()
    assert found["optimizers"]["muon"]["speedup_tokens"]["value"] is not None
    assert found["optimizers"]["muon"]["speedup_seconds"]["value"] is None
    assert found["optimizers"]["muon"]["cost"] is None
    assert all(run["seconds"] is None and run["seconds_as_run"] > 0 for run in found["runs"])
    assert not found["complete"]
    assert "have not been timed" in found["verdict"]


def test_the_verdict_waits_for_all_budgets_of_the_pair_and_for_nobody_else():
    example = Example()
    example.plan = replace(example.plan, done=False)  # ablations go on
    assert example.results()["verdict"].startswith("sophia-g saves")
    for one in (example.cell("muon"), example.cell("adamw", 2.0)):
        example.put(one, trials=(*one.trials[:-1], replace(one.trials[-1], finished=False)), best=None, finals=())
        waits = one.optimizer == "adamw"
        assert ("searches at other budgets go on" in example.results()["verdict"]) is waits


def simulated(study, most=10_000):
    def loss(spec):
        found = loss_of(spec)
        return None if math.isinf(found) else found

    finished = simulate(study, loss, most=most)
    return results.build(study, plan(study, finished), finished, [], CONTEXT)


@pytest.mark.parametrize("most", [0, 1, 4, 10, 25, 40, 60, 90, 120])
def test_a_study_gives_results_at_every_moment(most):
    study = replace(study_of(trials=6), ablations=study_of().ablations[:2])
    found = simulated(study, most)
    json.dumps(found, allow_nan=False)
    assert len(found["runs"]) == most
    assert not found["complete"]
    assert found["verdict"].startswith("No verdict yet on sophia-g against adamw: ")


@pytest.mark.parametrize("lost", ["adamw", "sophia-g"])
def test_where_every_run_diverged_nothing_is_waited_for(lost):
    """Of what has no best settings, no update can be timed."""
    study = study_of(trials=6)
    finished = simulate(study, lambda spec: None if spec.optimizer == lost else loss_of(spec))
    state = plan(study, finished)
    costs = [
        Cost(
            optimizer=case.name,
            settings=case.spec.settings,
            tokens_per_step=case.spec.tokens_per_step,
            seconds_per_step=1.0,
            ratio=1.0,
            ratio_low=1.0,
            ratio_high=1.0,
            rounds=6,
            steps_per_round=10,
            refreshes_per_round=1 if case.name.startswith("sophia") else None,
            flops_per_step=2.0 if case.name.startswith("sophia") else 1.0,
            peak_memory_bytes=None,
        )
        for case in timing.cases(study, state)
    ]
    found = results.build(study, state, finished, costs, CONTEXT)
    assert found["complete"]
    assert found["verdict"] == f"No verdict on sophia-g against adamw: in the search of {lost} every run diverged."
    assert not any("trials diverged" in flag for flag in found["flags"])
    assert any(flag.startswith(lost) and flag.endswith("every run of the search diverged") for flag in found["flags"])
    if costs:
        assert not results.build(study, state, finished, costs[1:], CONTEXT)["complete"]


def test_a_real_plan_gives_the_same_answer():
    found = simulated(study_of(trials=6))
    one = found["optimizers"]["muon"]["speedup_tokens"]
    assert one["value"] == pytest.approx(WORTH["muon"], rel=0.04)
    assert found["verdict"].endswith("updates of adamw have not been timed.")
    assert found["optimizers"]["adamw"]["trials"] == found["optimizers"]["soap"]["trials"] == 6
    best = found["optimizers"]["sophia-g"]["best_batch"]
    assert best["tokens_per_step"] == STEP
    assert best["speedup_tokens"] == found["optimizers"]["sophia-g"]["speedup_tokens"]


def test_at_its_best_batch_each_is_held_against_the_baselines_best():
    """AdamW gains 0.05 nats from a smaller batch, and the other entry does not."""

    def loss(spec):
        smaller = spec.tokens_per_step < STEP
        return loss_of(spec) - (0.08 if smaller and spec.optimizer == "adamw" else 0.0)

    study = study_of(other_batches=(STEP // 2,), baseline_budgets=(0.25, 0.5, 1.0, 2.0))
    finished = simulate(study, loss)
    state = plan(study, finished)
    found = results.build(study, state, finished, [], CONTEXT)["optimizers"]
    adamw, sophia = found["adamw"]["best_batch"], found["sophia-g"]["best_batch"]
    assert (adamw["tokens_per_step"], sophia["tokens_per_step"]) == (STEP // 2, STEP)
    assert adamw["speedup_tokens"]["value"] == 1.0
    assert sophia["speedup_tokens"]["value"] < 0.9
    assert found["sophia-g"]["speedup_tokens"]["value"] > 1.0
    assert sophia["claim"]


@pytest.mark.parametrize(
    ("worth", "price", "begins", "says"),
    [
        (1.3, 1.02, "sophia-g saves tokens and time against adamw: ", "adamw needs 1.3"),
        (1.3, 1.3, "sophia-g saves tokens but shows no saving in time against adamw: ", "the tokens and "),
        (1.3, 1.9, "sophia-g saves tokens but costs time against adamw: ", "the time"),
        (
            1.0,
            1.0,
            "No saving shown by sophia-g against adamw: ",
            "(95 % intervals over 6 seeds; nano, 1.235 million parameters; text: made-up text).",
        ),
        (1.0, 1.3, "sophia-g shows no saving in tokens and costs time against adamw: ", "1.235 million parameters"),
        (0.8, 1.02, "sophia-g costs tokens and time against adamw: ", "text: made-up text"),
        (6.0, 1.02, "sophia-g saves tokens and time against adamw: ", "needs at least 4.00 times the tokens"),
        (0.2, 1.02, "sophia-g costs tokens and time against adamw: ", "needs at most 0.50 times the tokens"),
    ],
)
def test_the_verdict_says_what_was_found(monkeypatch, worth, price, begins, says):
    monkeypatch.setitem(PRICE, "sophia-g", price)
    found = Example(worth={**WORTH, "sophia-g": worth}).results()
    assert found["verdict"].startswith(begins)
    assert says in found["verdict"]
    assert found["verdict"].count(".\n") == 0
    assert found["verdict"].endswith(").")


def test_one_seed_makes_no_claim():
    found = Example(study=study_of(seeds=(1,), headline_seeds=(), other_batches=())).results()
    one = found["optimizers"]["sophia-g"]
    assert one["speedup_tokens"]["low"] is None
    assert not one["claim"]
    assert found["verdict"].startswith("No saving shown")
    assert "(one seed, no interval)" in found["verdict"]


def test_untuned_optimizers_get_no_verdict_and_no_claim():
    found = Example(study=study_of(trials=0, retrials=0), worth={**WORTH, "sophia-g": 1.5}).results()
    one = found["optimizers"]["sophia-g"]
    assert one["speedup_tokens"]["low"] > 1.2
    assert not one["claim"]
    assert not one["claim_seconds"]
    assert found["verdict"].startswith("Untuned, so no verdict on sophia-g against adamw: ")
    assert sum(flag.startswith("untuned: no optimizer was searched") for flag in found["flags"]) == 1


def test_a_study_without_a_headline_has_no_verdict():
    found = Example(study=study_of(headline="", headline_seeds=(), other_batches=())).results()
    assert found["headline"] is None
    assert found["verdict"] == "No verdict: the study names no headline entry to hold against adamw."


def test_a_diverged_final_run_is_not_averaged_away():
    example = Example()
    spec = example.cell("muon").finals[0]
    example.bend(spec, val_loss=None, evidence=None)
    found = example.results()
    one = found["optimizers"]["muon"]
    assert one["final_loss"] == {"mean": None, "low": None, "high": None, "n": 0}
    assert one["speedup_tokens"]["bound"] == "at most"
    assert not one["claim"]
    assert any("1 of 3 final runs diverged (seed 1)" in flag and "muon" in flag for flag in found["flags"])
