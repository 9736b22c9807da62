import math

import pytest

from sophia.schedule import lr_factor, warmup_cosine

KINDS = ["cosine", "linear", "wsd", "constant"]


def factors(kind, steps, **settings):
    return [lr_factor(kind, t, **settings) for t in range(steps)]


def test_warmup_peak_and_end():
    factors = [warmup_cosine(t, total_steps=100, warmup_steps=10) for t in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1
    assert factors[99] == pytest.approx(0.05)
    assert factors[100] == pytest.approx(0.05)
    assert factors[:10] == sorted(factors[:10])
    assert factors[9:100] == sorted(set(factors[9:100]), reverse=True)
    assert factors[54] == pytest.approx(0.525, abs=0.01)  # half way down the cosine


def test_without_warmup_it_starts_at_the_peak():
    assert warmup_cosine(0, total_steps=10, warmup_steps=0) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup_steps", [0, 1, 10, 80])
def test_all_climb_alike_and_end_where_they_should(kind, warmup_steps):
    found = factors(kind, 150, total_steps=100, warmup_steps=warmup_steps, final_fraction=0.1)
    assert found[:warmup_steps] == pytest.approx([(t + 1) / warmup_steps for t in range(warmup_steps)])
    assert found[max(warmup_steps - 1, 0)] == 1
    end = 1 if kind == "constant" else 0.1
    assert found[99:] == [end] * 51
    after = found[warmup_steps:]
    assert after == sorted(after, reverse=True)
    assert min(found) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_shapes_are_those_of_their_formulas(kind):
    """The peak is update 9; "wsd" keeps it until update 79 and falls over 20."""
    for t in range(10, 100):
        x = (t - 9) / 90
        expected = {
            "cosine": 0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2,
            "linear": 1 - 0.9 * x,
            "wsd": 1 if t <= 79 else 1 - 0.9 * math.sqrt((t - 79) / 20),
            "constant": 1,
        }
        assert lr_factor(kind, t, total_steps=100, warmup_steps=10, final_fraction=0.1) == pytest.approx(expected[kind])


def test_the_share_of_the_decay():
    for fraction, first_below in [(0.5, 50), (0.01, 99), (0.001, 99), (0.9, 10)]:
        found = factors("wsd", 100, total_steps=100, warmup_steps=10, decay_fraction=fraction)
        assert found.index(next(f for f in found[10:] if f < 1)) == first_below
    whole = factors("wsd", 100, total_steps=100, warmup_steps=0, decay_fraction=1.0)
    assert whole[0] == 1
    assert whole[1] < 1


def test_a_run_can_be_prolonged_from_before_its_decay():
    short = factors("wsd", 80, total_steps=100, warmup_steps=10)
    assert short == factors("wsd", 80, total_steps=1000, warmup_steps=10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 0), (2, 1), (5, 4)])
def test_runs_of_few_steps(kind, total, warmup):
    found = factors(kind, total, total_steps=total, warmup_steps=warmup)
    assert all(0 < factor <= 1 for factor in found)
    if total - max(warmup, 1) > 0 and kind != "constant":
        assert found[-1] == pytest.approx(0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step is -1"),
        ({"warmup_steps": 100}, "warmup_steps 100"),
        ({"warmup_steps": -1}, "warmup_steps -1"),
        ({"final_fraction": 2.0}, "final_fraction is 2.0"),
    ],
)
def test_impossible_settings_are_refused(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        lr_factor(kind, **{"step": 0, "total_steps": 100, "warmup_steps": 10, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay_fraction": 0.0}, "decay_fraction is 0.0.*constant"),
        ({"decay_fraction": 1.1}, "decay_fraction is 1.1"),
        ({"decay_fraction": float("nan")}, "decay_fraction is nan"),
        ({"decay_fraction": 0.95}, "warmup_steps 10 and a decay of 95 steps.*total_steps 100"),
    ],
)
def test_impossible_decays_are_refused_from_the_first_step_on(arguments, message):
    for step in (0, 50, 99):
        with pytest.raises(ValueError, match=message):
            lr_factor("wsd", step, total_steps=100, warmup_steps=10, **arguments)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"'cosin'.*cosine, linear, wsd, constant"):
        lr_factor("cosin", 0, total_steps=10, warmup_steps=1)
