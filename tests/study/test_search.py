"""The search rule: what it tries for made-up landscapes of losses."""

import math
import random

import pytest

from sophia.study.beyond import beyond
from sophia.study.candidates import rate, rate_of
from sophia.study.runs import settings
from sophia.study.search import retune, scan, search

OTHERS = settings(beta2=0.95, weight_decay=0.1)


def run(landscape, *, trials=8, options=(), others=OTHERS, lr=0.008, factor=2.0, allowed=lambda _: True, steps=None):
    """Follow the rule to its end; also returns what was wanted together, step by step."""
    losses, batches = {}, []
    while steps is None or len(batches) < steps:
        found = search(
            lr=lr,
            others=others,
            options=options,
            trials=trials,
            factor=factor,
            loss_of=losses.get,
            allowed=allowed,
        )
        wanted = [one for one in found.candidates if one.loss is None]
        assert found.done is not bool(wanted)
        if found.done:
            break
        assert found.best is None
        assert found.edges == ()
        batches.append(wanted)
        losses.update({one.settings: landscape(dict(one.settings)) for one in wanted})
    return found, batches


def bowl(best, **others):
    """A bowl in log lr, and one for each other setting."""

    def landscape(chosen):
        return (
            3
            + math.log2(chosen["lr"] / best) ** 2
            + sum(abs(chosen[name] - value) for name, value in others.items() if name in chosen)
        )

    return landscape


def tried(found, name="lr"):
    return [dict(one.settings).get(name) for one in found.candidates]


def whys(found):
    return [one.why for one in found.candidates]


def test_the_grid_comes_together_and_refinement_on_both_sides():
    found, batches = run(bowl(0.009))
    assert [[dict(one.settings)["lr"] for one in batch] for batch in batches] == [
        [0.008, 0.004, 0.016],
        [0.0113, 0.00566],
        [0.00951, 0.00673],
        [0.00872],
    ]
    assert whys(found) == ["grid"] * 3 + ["refine"] * 5
    assert dict(found.best)["lr"] == 0.00872
    assert found.edges == ()


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (0.06, [0.008, 0.004, 0.016, 0.032, 0.064, 0.128]),
        (0.0011, [0.008, 0.004, 0.016, 0.002, 0.001, 0.0005]),
    ],
)
def test_an_optimum_on_the_edge_extends_the_grid_until_it_is_inside(best, expected):
    found, _ = run(bowl(best))
    assert tried(found)[:6] == expected
    assert whys(found)[3:7] == ["edge"] * 3 + ["refine"]
    assert found.edges == ()


@pytest.mark.parametrize(
    ("best", "sentence"), [(1e9, "lr 0.512 is the highest tried"), (0, "lr 0.000125 is the lowest")]
)
def test_an_edge_that_remains_is_reported(best, sentence):
    found, _ = run(lambda chosen: abs(chosen["lr"] - best))
    assert whys(found) == ["grid"] * 3 + ["edge"] * 5
    assert sentence in found.edges[0]
    assert len(found.candidates) == 8


def test_settings_are_tried_in_order_at_the_best_so_far():
    found, batches = run(
        bowl(0.008, weight_decay=0.3, beta2=0.9),
        options=[("weight_decay", (0.1, 0.3, 1.0)), ("beta2", (0.8, 0.9, 0.95))],
        trials=9,
    )
    assert whys(found) == ["grid"] * 3 + ["weight_decay"] * 2 + ["beta2"] * 2 + ["refine"] * 2
    assert tried(found, "weight_decay") == [0.1] * 3 + [0.3, 1.0] + [0.3] * 4
    assert tried(found, "beta2") == [0.95] * 5 + [0.8, 0.9] + [0.9] * 2
    assert [len(batch) for batch in batches] == [3, 2, 2, 2]
    assert dict(found.best) == {"lr": 0.008, "weight_decay": 0.3, "beta2": 0.9}
    assert found.edges == ()


def test_the_last_trial_goes_to_the_side_that_promises_more():
    """The rate beside the best is compared at the best's own settings, where it was tried there."""
    found, _ = run(bowl(0.0085), trials=4)
    assert tried(found)[3:] == [0.0113]
    found, _ = run(bowl(0.0075), trials=4)
    assert tried(found)[3:] == [0.00566]
    options = [("weight_decay", (0.1, 0.3))]
    found, _ = run(bowl(0.0085, weight_decay=0.3), trials=6, options=options)
    assert whys(found)[3:] == ["weight_decay"] * 2 + ["refine"]
    assert tried(found)[5:] == [0.0113]


def test_what_promises_more_is_read_at_the_bests_own_settings():
    def landscape(chosen):
        away = math.log2(chosen["lr"] / 0.008)
        return {0.1: 3.5 + away**2, 0.3: 3.0 + (away - 0.6) ** 2, 0.9: 9.0}[chosen["weight_decay"]]

    found, _ = run(landscape, trials=9, options=[("weight_decay", (0.1, 0.3))])
    assert whys(found) == ["grid"] * 3 + ["weight_decay"] * 2 + ["refine"] * 4
    # At 0.3 the rate above the best is the better neighbour, at 0.1 the one below.
    assert tried(found)[5:] == [0.00566, 0.0113, 0.016, 0.0135]


def test_the_value_that_a_setting_has_costs_nothing():
    found, _ = run(bowl(0.008, beta2=0.95), options=[("beta2", (0.9, 0.95, 0.99))], trials=5)
    assert tried(found, "beta2") == [0.95, 0.95, 0.95, 0.9, 0.99]


def test_a_numeric_setting_is_extended_beyond_its_list():
    found, _ = run(bowl(0.008, beta2=0.975), options=[("beta2", (0.9, 0.95))])
    assert tried(found, "beta2")[3:6] == [0.9, 0.975, 0.9875]
    assert dict(found.best)["beta2"] == 0.975
    assert found.edges == ()


def test_a_numeric_setting_is_extended_below_its_list():
    found, _ = run(bowl(0.008, gamma=0.02), options=[("gamma", (0.1, 0.5))], others=settings(gamma=0.1))
    assert tried(found, "gamma")[3:6] == [0.5, 0.02, 0.004]
    assert dict(found.best)["gamma"] == 0.02
    assert found.edges == ()


def test_a_setting_on_its_edge_without_trials_left_is_reported():
    found, _ = run(bowl(0.008, weight_decay=5.0), options=[("weight_decay", (0.1, 0.3))], trials=4)
    assert found.edges == ("weight_decay 0.3 is the highest tried: the trials were spent",)
    found, _ = run(bowl(0.008, weight_decay=5.0), options=[("weight_decay", (0.1, 0.3))], trials=8)
    assert tried(found, "weight_decay")[3:6] == [0.3, 0.9, 1.0]
    assert found.edges == ("weight_decay 1 is the highest tried, at the end of its range",)


def test_an_extension_stays_where_settings_could_be_run():
    options = [("curvature_rows", (2, 4))]
    others = settings(curvature_rows=2)
    found, _ = run(
        bowl(0.008, curvature_rows=100),
        options=options,
        others=others,
        allowed=lambda chosen: dict(chosen)["curvature_rows"] <= 8,
    )
    assert max(tried(found, "curvature_rows")) == 8
    assert found.edges == ("curvature_rows 8 is the highest tried, at the end of its range",)


@pytest.mark.parametrize(("name", "values"), [("weight_decay", (0.0, 0.1)), ("curvature_interval", (1, 10))])
def test_what_has_nothing_below_by_nature_is_no_edge(name, values):
    found, _ = run(bowl(0.008, **{name: -5}), options=[(name, values)], others=settings(**{name: values[1]}))
    assert dict(found.best)[name] == values[0]
    assert found.edges == ()


def test_words_are_tried_and_have_no_edge():
    found, _ = run(
        lambda chosen: 3 + abs(math.log(chosen["lr"] / 0.008)) - (chosen["curvature_noise"] == "signs"),
        options=[("curvature_noise", ("labels", "signs"))],
        others=settings(curvature_noise="labels"),
    )
    assert dict(found.best)["curvature_noise"] == "signs"
    assert found.edges == ()


def test_a_word_among_numbers_is_no_edge_and_the_numbers_are_extended():
    options, others = [("gamma", (0.1, 0.5, "auto"))], settings(gamma=0.1)
    worth = {"auto": 0.0, 0.1: 1.0, 0.5: 0.5, 2.5: 0.7}
    found, _ = run(lambda c: worth[c["gamma"]] + abs(math.log(c["lr"] / 0.008)), options=options, others=others)
    assert dict(found.best)["gamma"] == "auto"
    worth["auto"] = 9.0
    found, _ = run(lambda c: worth[c["gamma"]] + abs(math.log(c["lr"] / 0.008)), options=options, others=others)
    assert tried(found, "gamma")[3:6] == [0.5, "auto", 2.5]
    assert dict(found.best)["gamma"] == 0.5
    assert found.edges == ()


def test_settings_that_the_trials_do_not_reach_are_named():
    found, _ = run(bowl(0.008), options=[("weight_decay", (0.1, 0.3, 1.0)), ("beta2", (0.9, 0.95))], trials=4)
    assert "weight_decay was not searched at 1.0: the trials were spent before" in found.edges
    assert "beta2 was not searched: the trials were spent before" in found.edges


def test_divergence_is_infinitely_bad_and_lower_rates_follow():
    found, _ = run(lambda chosen: math.inf if chosen["lr"] > 0.0015 else 3 + abs(math.log(chosen["lr"] / 0.0005)))
    assert tried(found)[:6] == [0.008, 0.004, 0.016, 0.002, 0.001, 0.0005]
    assert dict(found.best)["lr"] == 0.0005
    assert found.edges == ()


def test_when_all_diverge_there_is_no_best_and_it_is_said():
    found, _ = run(lambda _: math.inf, options=[("beta2", (0.9,))])
    assert found.done
    assert found.best is None
    assert found.edges == ("every run of the search diverged",)
    assert len(found.candidates) == 8


def test_of_equals_the_earliest_is_the_best():
    found, _ = run(lambda _: 3.0, options=[("beta2", (0.9, 0.95))])
    assert dict(found.best)["lr"] == 0.008
    assert dict(found.best)["beta2"] == 0.95


@pytest.mark.parametrize("seed", range(60))
def test_any_landscape_gets_its_trials_and_none_twice(seed):
    draw = random.Random(seed)
    trials, factor = draw.randint(3, 24), draw.choice([1.1, 1.5, 2.0, math.e, 10.0])
    noise = draw.choice([0.0, 0.1, 10.0])

    def landscape(chosen):
        if draw.random() < 0.1:
            return math.inf
        return bowl(10 ** draw.uniform(-5, 1), weight_decay=0.3)(chosen) + draw.gauss(0, noise)

    options = [("weight_decay", (0.1, 0.3, 1.0)), ("beta2", (0.9, 0.95)), ("beta1", (0.0, 0.5, 0.9))]
    draw.shuffle(options)
    found, _ = run(landscape, trials=trials, factor=factor, options=options, lr=draw.choice([0.008, 1.2345e-4, 1.0]))
    assert len(found.candidates) == trials
    assert len({one.settings for one in found.candidates}) == trials
    best = min(one.loss for one in found.candidates)
    assert found.best == (None if best == math.inf else next(o.settings for o in found.candidates if o.loss == best))
    for one in found.candidates:
        chosen = dict(one.settings)
        assert chosen["lr"] > 0
        assert 0 <= chosen["weight_decay"] <= 1
        assert all(0 <= chosen.get(name, 0.5) < 1 for name in ("beta1", "beta2"))


@pytest.mark.parametrize("known", range(8))
def test_a_search_goes_on_from_any_point_as_if_it_had_not_stopped(known):
    landscape = bowl(0.02, weight_decay=1.0)
    options = [("weight_decay", (0.1, 0.3)), ("beta2", (0.9, 0.95))]
    whole, _ = run(landscape, options=options)
    losses = {one.settings: one.loss for one in whole.candidates[:known]}
    part = search(lr=0.008, others=OTHERS, options=options, trials=8, factor=2.0, loss_of=losses.get)
    asked = [one.settings for one in part.candidates]
    assert asked == [one.settings for one in whole.candidates[: len(asked)]]
    assert len(asked) > known


def test_rates_have_three_digits_whatever_way_they_are_reached():
    found, _ = run(bowl(0.0085), trials=12)
    assert all(float(f"{lr:.3g}") == lr for lr in tried(found))
    # Back and forth by roots of 2: 0.008 is met again, not 0.00799.
    assert len(set(tried(found))) == 12
    assert all(abs(math.log(a / b)) > 0.01 for a in tried(found) for b in tried(found) if a != b)


def test_the_first_rate_is_taken_as_it_is():
    assert tried(run(bowl(1.0), lr=0.0012345)[0])[:3] == [0.0012345, 0.000617, 0.00247]


def test_a_rate_in_the_middle_of_two_is_rounded_by_decimal_digits():
    # 0.0025 / 8 = 0.0003125 exactly: to the even digit, on every machine.
    assert rate(0.0025, 2.0, -3) == 0.000312
    assert rate(0.0075, 2.0, -3) == 0.000938


def around(landscape, **asked):
    losses = {}
    while not (found := retune(settings=settings(lr=0.008, beta2=0.9), factor=2.0, loss_of=losses.get, **asked)).done:
        losses.update({one.settings: landscape(dict(one.settings)) for one in found.candidates if one.loss is None})
    return found


def test_another_budget_tries_rates_around_the_best():
    found = around(bowl(0.008), rates=3)
    assert tried(found) == [0.008, 0.004, 0.016]
    assert found.edges == ()
    assert set(tried(found, "beta2")) == {0.9}
    assert tried(around(bowl(0.008), rates=5)) == [0.008, 0.004, 0.016, 0.002, 0.032]


def test_another_budget_goes_two_beyond_its_edge_at_most():
    found = around(bowl(0.02), rates=3)
    assert tried(found) == [0.008, 0.004, 0.016, 0.032]
    assert found.edges == ()
    found = around(bowl(1e3), rates=3)
    assert tried(found) == [0.008, 0.004, 0.016, 0.032, 0.064]
    assert found.edges == ("lr 0.064 is the highest tried",)
    found = around(bowl(0.008), rates=2)
    assert tried(found) == [0.008, 0.004, 0.016]


def test_one_rate_is_no_search_and_it_is_said():
    found = around(bowl(1e3), rates=1)
    assert tried(found) == [0.008]
    assert found.edges == ("lr 0.008 is the only one tried",)


def test_factors_of_a_rate_are_tried_together_and_nothing_else():
    first = scan(settings=settings(lr=0.00951, gamma=0.1), factors=(0.5, 1.0, 2.0), loss_of=lambda _: None)
    assert tried(first) == [0.00476, 0.00951, 0.019]
    assert not first.done
    found = scan(settings=settings(lr=0.01), factors=(0.5, 1.0, 2.0), loss_of=rate_of)
    assert dict(found.best)["lr"] == 0.005
    assert found.edges == ("lr 0.005 is the lowest tried",)
    gone = scan(settings=settings(lr=0.01), factors=(0.5, 1.0), loss_of=lambda _: math.inf)
    assert gone.best is None
    assert gone.edges == ("every run of the search diverged",)


@pytest.mark.parametrize(
    ("name", "edge", "neighbour", "expected"),
    [
        ("beta2", 0.95, 0.9, 0.975),
        ("beta2", 0.99, 0.9, 0.999),
        ("beta2", 0.9, 0.95, 0.8),
        ("beta1", 0.5, 0.9, 0.0),
        ("beta1", 0.0, 0.5, None),
        ("weight_decay", 0.3, 0.1, 0.9),
        ("weight_decay", 0.9, 0.3, 1.0),
        ("weight_decay", 1.0, 0.3, None),
        ("weight_decay", 0.1, 0.0, 0.2),
        ("weight_decay", 0.0, 0.1, None),
        ("weight_decay", 0.1, 0.3, 0.0333),
        ("gamma", 0.1, 0.5, 0.02),
        ("gamma", 2.0, 0.5, 8.0),
        ("eps", 1e-7, 1e-8, 1e-6),
        ("curvature_interval", 10, 5, 20),
        ("curvature_interval", 3, 10, 1),
        ("curvature_interval", 1, 10, None),
        ("curvature_interval", 2, 3, 1),
    ],
)
def test_the_value_beyond(name, edge, neighbour, expected):
    found = beyond(name, edge, neighbour)
    assert found == expected
    assert type(found) is (type(None) if expected is None else type(edge))
