import pytest

from sophia.schedule import warmup_cosine


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step is -1"),
        ({"warmup_steps": 100}, "warmup_steps 100"),
        ({"final_fraction": 2.0}, "final_fraction is 2.0"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        warmup_cosine(**{"step": 0, "total_steps": 100, "warmup_steps": 10, **arguments})
