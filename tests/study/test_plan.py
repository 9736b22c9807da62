"""The planner: simulated races, in which a run ends at once with the loss of a made-up landscape."""

import dataclasses
import itertools
import math
from collections import Counter

import pytest

from sophia.config import MachineSettings, ModelSettings
from sophia.study.plan import best_batch, plan, role, roles
from sophia.study.runs import settings
from sophia.study.settings import Ablation, Entry, RaceSettings, Study
from tests.study.simulated import simulate

T, STEP = 40 * 2048, 2048
BEST = {"adamw": 0.007, "lion": 0.0011, "sophia-g": 0.0045, "muon": 0.008}


def study_of(*names, ablations=(), **race):
    given = {
        "tokens": T,
        "tokens_per_step": STEP,
        "headline": "sophia-g" if "sophia-g" in names else "",
        "headline_seeds": (1, 2, 3, 4) if "sophia-g" in names else (),
        "trials": 6,
        **race,
    }
    searches = {"adamw": (("weight_decay", (0.1, 0.3)),), "sophia-g": (("gamma", (0.1, 0.5)),)}
    first = {"adamw": settings(weight_decay=0.1), "sophia-g": settings(gamma=0.1)}
    return Study(
        name="simulated",
        model=ModelSettings(model="nano"),
        race=RaceSettings(**given),
        machine=MachineSettings(device="cpu"),
        optimizers=tuple(
            Entry(
                name=name,
                optimizer=name,
                lr={"adamw": 8e-3, "lion": 1e-3, "sophia-g": 2e-3, "muon": 8e-3}[name],
                settings=first.get(name, ()),
                search=searches.get(name, ()),
            )
            for name in names
        ),
        ablations=ablations,
    )


def loss_of(spec):
    chosen = dict(spec.settings)
    away = math.log2(chosen["lr"] / BEST[spec.optimizer] / math.sqrt(spec.tokens_per_step / STEP))
    decay = 0.1 * abs(chosen.get("weight_decay", 0.2) - 0.2)
    batch = 0.05 * abs(math.log2(spec.tokens_per_step / STEP))
    return 4 + 0.1 * away**2 + decay + batch - 0.2 * math.log(spec.tokens / T) + 0.01 * spec.seed


ABLATIONS = (
    Ablation(name="signs", of="sophia-g", settings=settings(curvature_noise="signs")),
    Ablation(name="often", of="sophia-g", settings=settings(curvature_interval=1), lr_factors=(0.5, 1.0, 2.0)),
)
FULL = study_of("lion", "adamw", "muon", "sophia-g", ablations=ABLATIONS, other_batches=(1024, 4096))


def specs(finished):
    return [run.spec for run in finished.values()]


@pytest.fixture(scope="module")
def whole():
    return simulate(FULL, loss_of, workers=1)


def cell(found, name, steps, batch=STEP):
    (one,) = [c for c in found.cells if (c.optimizer, c.steps, c.tokens_per_step) == (name, steps, batch)]
    return one


def test_every_optimizer_gets_the_same_trials_and_its_seeds(whole):
    found = plan(FULL, whole)
    assert found.done
    assert (found.steps_left, found.tokens_left) == (0, 0)
    for name in BEST:
        assert len(cell(found, name, 40).trials) == FULL.race.trials
    seeds = {(c.optimizer, c.steps, c.tokens_per_step): tuple(spec.seed for spec in c.finals) for c in found.cells}
    few, many = (1, 2, 3), (1, 2, 3, 4)
    assert seeds == {
        ("adamw", 40, 2048): many,
        ("adamw", 20, 2048): many,
        ("adamw", 80, 2048): few,
        ("adamw", 160, 2048): few,
        ("adamw", 80, 1024): many,
        ("adamw", 20, 4096): many,
        ("lion", 40, 2048): few,
        ("muon", 40, 2048): few,
        ("sophia-g", 40, 2048): many,
        ("sophia-g", 20, 2048): many,
        ("sophia-g", 80, 1024): many,
        ("sophia-g", 20, 4096): many,
    }
    assert Counter(roles(found).values()) == Counter(role(found, id) for id in whole)
    assert "other" not in roles(found).values()


def test_the_cells_stand_in_the_order_of_tables(whole):
    names = [c.optimizer for c in plan(FULL, whole).cells]
    assert list(dict.fromkeys(names)) == ["adamw", "lion", "muon", "sophia-g"]
    assert [c.steps for c in plan(FULL, whole).cells if c.optimizer == "adamw"] == [40, 20, 80, 160, 80, 20]


def test_trials_have_the_searchs_seed_and_finals_do_not(whole):
    found = plan(FULL, whole)
    for id, what in roles(found).items():
        seed = whole[id].spec.seed
        assert (seed == FULL.race.search_seed) is (what == "search" or (what == "ablation" and seed == 0))
    assert {spec.seed for c in found.cells for spec in c.finals} == {1, 2, 3, 4}


def test_no_other_optimizer_runs_before_the_baselines_searches_are_done(whole):
    ids = list(whole)
    for count in range(len(ids)):
        found = plan(FULL, {id: whole[id] for id in ids[:count]})
        others = [spec for spec in found.wanted if spec.optimizer != "adamw"]
        baseline = [c for c in found.cells if c.optimizer == "adamw"]
        searching = len(baseline) < 6 or any(not trial.finished for c in baseline for trial in c.trials)
        assert not (others and searching), count


def stage(found, spec):
    """Where a run stands in the order: searches at T, finals at T, other budgets, other batches, ablations."""
    what = role(found, spec.id)
    if what == "ablation":
        return 5
    if spec.tokens_per_step != STEP:
        return 4
    if spec.steps != 40:
        return 3
    return 1 if what == "search" else 2


def test_one_worker_runs_them_in_the_order_of_urgency(whole):
    found = plan(FULL, whole)
    order = specs(whole)
    own = [spec for spec in order if spec.optimizer == "adamw"]
    assert order[: len(own)] == own
    main = [
        spec for spec in own if role(found, spec.id) == "search" and (spec.steps, spec.tokens_per_step) == (40, STEP)
    ]
    assert own[: len(main)] == main
    whats = [role(found, spec.id) for spec in own]
    assert whats == sorted(whats, key=["search", "final"].index)
    finals = own[whats.index("final") :]
    assert [spec.seed for spec in finals] == sorted(spec.seed for spec in finals)
    for _, same in itertools.groupby(finals, key=lambda spec: spec.seed):
        lengths = [spec.steps for spec in same]
        assert lengths == sorted(lengths, reverse=True)
    stages = [stage(found, spec) for spec in order[len(own) :]]
    assert stages == sorted(stages)


def test_the_longest_searches_of_the_baseline_come_first(whole):
    found = plan(FULL, whole)
    lengths = [s.steps for s in specs(whole) if s.optimizer == "adamw" and role(found, s.id) == "search"][6:]
    assert lengths == sorted(lengths, reverse=True)


def test_others_search_side_by_side_and_finish_seed_by_seed(whole):
    found = plan(FULL, whole)
    tried, counted = Counter(), []
    for spec in specs(whole):
        if spec.optimizer == "adamw" or (spec.steps, spec.tokens_per_step) != (40, STEP):
            continue
        what = role(found, spec.id)
        if what == "search":
            tried[spec.optimizer] += 1
            assert max(tried.values()) - min(tried[name] for name in ("lion", "muon", "sophia-g")) <= 1
        elif what == "final":
            counted.append((spec.seed, spec.optimizer))
    assert tried == {"lion": 6, "muon": 6, "sophia-g": 6}
    names = ["lion", "muon", "sophia-g"]
    assert counted == [(seed, name) for seed in (1, 2, 3) for name in names] + [(4, "sophia-g")]


@pytest.mark.parametrize("workers", [2, 3, 16])
def test_how_many_run_at_once_changes_nothing_but_the_order(whole, workers):
    assert simulate(FULL, loss_of, workers=workers).keys() == whole.keys()


def test_there_is_work_for_many_once_the_baseline_is_searched(whole):
    found = plan(FULL, whole)
    baseline = {
        id: whole[id] for id, what in roles(found).items() if whole[id].spec.optimizer == "adamw" and what == "search"
    }
    wanted = plan(FULL, baseline).wanted
    # 22 finals of the baseline and three grids of three rates.
    assert len(wanted) == 22 + 9
    assert {spec.optimizer for spec in wanted[:22]} == {"adamw"}


@pytest.mark.parametrize("most", [1, 5, 17, 40, 41, 60, 90])
def test_a_study_goes_on_from_any_point_as_if_it_had_not_stopped(whole, most):
    part = simulate(FULL, loss_of, most=most)
    assert len(part) == most
    asked = []

    def counted(spec):
        asked.append(spec.id)
        return loss_of(spec)

    again = simulate(FULL, counted, finished=part)
    assert again.keys() == whole.keys()
    assert not set(asked) & part.keys()
    assert len(asked) == len(set(asked)) == len(whole) - most


def test_the_plan_does_not_depend_on_the_order_in_which_runs_ended(whole):
    ids = list(whole)[:55]
    assert plan(FULL, {id: whole[id] for id in ids}) == plan(FULL, {id: whole[id] for id in reversed(ids)})


def test_an_entry_or_ablation_that_comes_later_reuses_all_that_ran(whole):
    first = study_of("lion", "adamw", "sophia-g", other_batches=(1024, 4096))
    part = simulate(first, loss_of)
    assert part.keys() < whole.keys()
    assert simulate(FULL, loss_of, finished=part).keys() == whole.keys()
    left = [spec for spec in specs(whole) if spec.id not in part]
    assert {spec.optimizer for spec in left} == {"muon", "sophia-g"}


def test_runs_that_a_study_no_longer_asks_for_are_others(whole):
    found = plan(study_of("lion", "adamw", "sophia-g", other_batches=(1024, 4096)), whole)
    assert found.done
    assert {spec.optimizer for id, run in whole.items() if role(found, id) == "other" for spec in [run.spec]} == {
        "muon",
        "sophia-g",  # its ablations
    }


def test_another_optimizer_under_the_same_name_is_run_anew(whole):
    entries = [dataclasses.replace(one, optimizer="nadamw") if one.name == "muon" else one for one in FULL.optimizers]
    found = plan(dataclasses.replace(FULL, optimizers=tuple(entries)), whole)
    assert {spec.kind for spec in found.wanted} == {"nadamw"}


def test_the_centre_at_another_batch_is_scaled_by_the_root_of_the_ratio(whole):
    found = plan(FULL, whole)
    best = dict(cell(found, "sophia-g", 40).best)["lr"]
    half = cell(found, "sophia-g", 80, 1024)
    assert dict(half.trials[0].spec.settings)["lr"] == pytest.approx(best / math.sqrt(2), rel=5e-3)
    assert cell(found, "sophia-g", 20).trials[0].spec.settings == cell(found, "sophia-g", 40).best


def test_a_batch_that_is_better_for_the_baseline_gets_all_its_budgets(whole):
    def better(spec):
        return loss_of(spec) - (0.5 if spec.tokens_per_step == 1024 else 0.0)

    found = plan(FULL, done := simulate(FULL, better))
    assert best_batch(FULL, found.cells, done, "adamw") == 1024
    assert {(c.steps, c.tokens_per_step) for c in found.cells if c.optimizer == "adamw"} == {
        (40, 2048),
        (20, 2048),
        (80, 2048),
        (160, 2048),
        (80, 1024),
        (20, 4096),
        (40, 1024),
        (160, 1024),
        (320, 1024),
    }
    assert [spec.seed for spec in cell(found, "adamw", 320, 1024).finals] == [1, 2, 3]
    assert [spec.seed for spec in cell(found, "adamw", 40, 1024).finals] == [1, 2, 3, 4]
    # An equal one stays with everybody's; so does one that is not finished.
    assert best_batch(FULL, plan(FULL, whole).cells, whole, "adamw") == 2048
    part = {id: run for id, run in done.items() if run.spec.seed != 4}
    assert best_batch(FULL, plan(FULL, part).cells, part, "adamw") is None


def test_ablations_are_the_entry_with_something_changed(whole):
    signs, often = plan(FULL, whole).ablations
    best = dict(cell(plan(FULL, whole), "sophia-g", 40).best)
    assert dict(signs.best) == {**best, "curvature_noise": "signs"}
    assert signs.trials == ()
    assert [spec.seed for spec in signs.finals] == [1, 2, 3]
    assert len(often.trials) == 3
    assert {dict(t.spec.settings)["lr"] for t in often.trials} >= {best["lr"]}
    assert all(trial.spec.optimizer == "sophia-g" and trial.spec.seed == 0 for trial in often.trials)
    assert {role(plan(FULL, whole), spec.id) for spec in (*signs.finals, *often.finals)} == {"ablation"}


def test_an_ablation_that_the_search_had_chosen_runs_once_and_counts_as_final():
    same = Ablation(name="same", of="sophia-g", settings=settings(gamma=0.5))
    study = study_of("adamw", "sophia-g", ablations=(same,))
    done = simulate(study, lambda spec: loss_of(spec) - dict(spec.settings).get("gamma", 0.0))
    found = plan(study, done)
    (ablation,) = found.ablations
    if ablation.best == cell(found, "sophia-g", 40).best:
        assert role(found, ablation.finals[0].id) == "final"
    assert len({spec.id for spec in found.wanted}) == len(found.wanted)


def test_an_optimizer_that_always_diverges_does_not_stop_the_others():
    study = study_of("adamw", "sophia-g", "lion", ablations=ABLATIONS)
    done = simulate(study, lambda spec: None if spec.optimizer == "sophia-g" else loss_of(spec))
    found = plan(study, done)
    assert found.done
    assert found.steps_left == 0
    lost = cell(found, "sophia-g", 40)
    assert (lost.best, lost.finals, lost.edges) == (None, (), ("every run of the search diverged",))
    assert len(lost.trials) == 6
    assert all(trial.finished and trial.loss is None for trial in lost.trials)
    assert [one.finals for one in found.ablations] == [(), ()]
    assert len(cell(found, "lion", 40).finals) == 3


def test_a_baseline_that_always_diverges_ends_the_study():
    """Nothing could be measured against it, and its entry can change in a new study only."""
    study = study_of("adamw", "lion", "sophia-g", ablations=ABLATIONS, other_batches=(1024,))
    done = simulate(study, lambda spec: None if spec.optimizer == "adamw" else loss_of(spec))
    found = plan(study, done)
    assert (found.done, found.steps_left, found.tokens_left) == (True, 0, 0)
    assert Counter(spec.optimizer for spec in specs(done)) == {"adamw": 6}


def test_final_runs_that_diverge_are_finished():
    study = study_of("adamw", "lion")
    done = simulate(study, lambda spec: None if spec.seed == 2 else loss_of(spec))
    assert plan(study, done).done


def test_an_edge_is_reported_where_it_is():
    study = study_of("adamw", "lion", trials=4)
    done = simulate(study, lambda spec: loss_of(spec) if spec.optimizer == "adamw" else 1 / dict(spec.settings)["lr"])
    found = plan(study, done)
    assert cell(found, "lion", 40).edges == ("lr 0.004 is the highest tried",)
    assert [t.why for t in cell(found, "lion", 40).trials] == ["grid"] * 3 + ["edge"]
    assert "lion" not in {c.optimizer for c in found.cells if c.steps != 40}


def test_an_extension_never_asks_for_what_the_trainer_refuses():
    """A step has 16 sequences of 128 tokens: curvature cannot be made from 32 of them."""
    entry = Entry(
        name="sophia-g",
        optimizer="sophia-g",
        lr=2e-3,
        settings=settings(curvature_rows=4),
        search=(("curvature_rows", (4, 8)),),
    )
    study = dataclasses.replace(study_of("adamw"), optimizers=(study_of("adamw").optimizers[0], entry))
    done = simulate(study, lambda s: loss_of(s) - dict(s.settings).get("curvature_rows", 0) * 0.01)
    found = cell(plan(study, done), "sophia-g", 40)
    assert max(dict(t.spec.settings)["curvature_rows"] for t in found.trials) == 16
    assert "curvature_rows 16 is the highest tried, at the end of its range" in found.edges


def test_what_is_left_is_honest_from_the_start_and_falls(whole):
    total = sum(spec.steps for spec in specs(whole))
    assert plan(FULL, {}).steps_left == pytest.approx(total, rel=0.1)
    done, before = {}, plan(FULL, {})
    for id, run in whole.items():
        done[id] = run
        now = plan(FULL, done)
        # An extension that nobody could foresee is the only thing that adds.
        assert now.steps_left <= before.steps_left
        assert now.done is (now.steps_left == 0)
        before = now


def test_without_a_search_all_run_as_the_file_has_them():
    study = study_of("adamw", "sophia-g", ablations=ABLATIONS[:1], trials=0, retrials=0, other_batches=(1024,))
    finished = simulate(study, loss_of)
    assert plan(study, finished).done
    assert {spec.seed for spec in specs(finished)} == {1, 2, 3, 4}
    rates = {(spec.optimizer, spec.tokens_per_step): dict(spec.settings)["lr"] for spec in specs(finished)}
    assert rates["adamw", STEP] == 8e-3
    assert rates["sophia-g", STEP] == 2e-3
    assert rates["adamw", 1024] == 5.66e-3  # by the root of the batch
    # Half, once, twice and four times T for adamw; half and once for sophia-g; the other batch; one ablation.
    assert len(finished) == (4 + 4 + 3 + 3) + (4 + 4) + (4 + 4) + 3


def test_searches_at_half_the_budget():
    """Trials, of ablations too, are half as long; what counts is not, and the same trials serve the budget T/2."""
    study = study_of("adamw", "lion", "sophia-g", ablations=ABLATIONS, search_budget=0.5)
    done = simulate(study, loss_of, workers=1)
    found = plan(study, done)
    assert found.done
    for name in ("adamw", "lion", "sophia-g"):
        main = cell(found, name, 40)
        assert [trial.spec.steps for trial in main.trials] == [20] * study.race.trials
        assert {spec.steps for spec in main.finals} == {40}
        best = min(main.trials, key=lambda trial: trial.loss)
        assert main.best == best.spec.settings
    assert {t.spec.steps for one in found.ablations for t in one.trials} == {20}
    half, tried = cell(found, "adamw", 20), {trial.spec.id for trial in cell(found, "adamw", 40).trials}
    assert tried & {trial.spec.id for trial in half.trials}
    assert plan(study, {}).steps_left == pytest.approx(sum(spec.steps for spec in specs(done)), rel=0.1)
