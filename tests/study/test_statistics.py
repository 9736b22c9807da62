"""The judge's arithmetic against hand-computed numbers, scipy's tests, and studies whose truth is known."""

import math
import random
import statistics
from typing import Any

import pytest
from scipy import stats

from sophia.study.curve import Curve, curves, mean_curve
from sophia.study.speedup import Speedup, over, speedup
from sophia.study.statistics import Estimate, difference, divided, mean, median_interval

T = 1_000_000


def test_an_interval_by_hand():
    found = mean([1.0, 2.0, 3.0])
    assert found is not None
    assert found.value == 2.0
    assert found.low == pytest.approx(2.0 - 4.302652729911275 / math.sqrt(3))  # s = 1, t with 2 degrees of freedom
    assert found.high == pytest.approx(2.0 + 4.302652729911275 / math.sqrt(3))
    assert (found.n, found.bound) == (3, None)


def test_an_interval_is_that_of_scipys_t_test():
    values = [random.Random(place).gauss(3.0, 0.2) for place in range(6)]
    found = mean(values)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_one_value_has_no_interval_and_none_no_mean():
    assert mean([]) is None
    assert mean([2.5]) == Estimate(value=2.5, low=None, high=None, n=1)
    assert Estimate(value=2.5, low=None, high=None, n=1).holds(-7.0)  # nothing is excluded


def test_differences_are_paired_by_seed():
    ours, theirs = {1: 3.0, 2: 5.0, 3: 9.0, 7: 100.0}, {3: 8.8, 2: 4.9, 1: 2.7, 9: -100.0}
    found = difference(ours, theirs)
    expected = stats.ttest_rel([3.0, 5.0, 9.0], [2.7, 4.9, 8.8]).confidence_interval(0.95)
    assert found is not None
    assert (found.n, found.value) == (3, pytest.approx(0.2))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_the_interval_of_a_median_is_the_one_of_the_binomial_table():
    """Ranks as in tables of the sign test at 5 %: none below 6, the first for 6 to 8, the fourth for 15 to 16."""
    ranks = {4: 1, 5: 1, 6: 1, 8: 1, 9: 2, 11: 2, 12: 3, 14: 3, 15: 4, 16: 4, 17: 5, 20: 6, 25: 8}
    for n, rank in ranks.items():
        values = random.Random(n).sample(range(1, n + 1), n)
        assert median_interval([float(value) for value in values]) == (rank, n + 1 - rank)


def test_time_counts_both_uncertainties():
    tokens = Estimate(value=1.2, low=1.2 / 1.03, high=1.2 * 1.04, n=6)
    price = Estimate(value=1.1, low=1.1 / 1.05, high=1.1 * 1.02, n=8)
    found = divided(tokens, price)
    assert found.value == pytest.approx(1.2 / 1.1)
    # A dear price lowers the speed-up: the tokens' lower end goes with the price's upper one.
    assert found.low is not None
    assert found.high is not None
    assert math.log(found.value / found.low) == pytest.approx(math.hypot(math.log(1.03), math.log(1.02)))
    assert math.log(found.high / found.value) == pytest.approx(math.hypot(math.log(1.04), math.log(1.05)))
    assert divided(Estimate(value=4.0, low=None, high=None, n=3, bound="at least"), price).bound == "at least"


def test_the_curve_is_linear_in_the_logarithm_of_the_budget():
    curve = Curve(tokens=(T, 4 * T, 8 * T), losses=(3.0, 2.0, 1.5))
    assert curve.tokens_for(2.5) == (pytest.approx(2 * T), None)  # half-way from T to 4 T is 2 T
    assert curve.tokens_for(1.75) == (pytest.approx(4 * T * math.sqrt(2)), None)
    assert curve.tokens_for(3.0) == (pytest.approx(T), None)
    assert curve.tokens_for(2.0) == (pytest.approx(4 * T), None)
    assert curve.tokens_for(1.5) == (pytest.approx(8 * T), None)


def test_beyond_the_budgets_there_is_a_bound_and_no_extrapolation():
    curve = Curve(tokens=(T, 4 * T), losses=(3.0, 2.0))
    assert curve.tokens_for(1.999) == (4 * T, "at least")
    assert curve.tokens_for(-50.0) == (4 * T, "at least")
    assert curve.tokens_for(3.001) == (T, "at most")
    assert curve.tokens_for(math.inf) == (T, "at most")


def test_where_the_curve_rises_the_least_budget_counts():
    curve = Curve(tokens=(T, 2 * T, 4 * T, 8 * T), losses=(3.0, 2.4, 2.6, 2.0))
    assert curve.rises() == ((2 * T, 4 * T),)
    needed, bound = curve.tokens_for(2.5)
    assert bound is None
    assert needed == pytest.approx(T * 2 ** (5 / 6))  # on the way down from 3.0 to 2.4, not from 2.6 to 2.0
    assert curve.tokens_for(2.3)[0] == pytest.approx(4 * T * math.sqrt(2))
    assert Curve(tokens=(T, 2 * T), losses=(2.0, 2.0)).rises() == ((T, 2 * T),)


def test_a_seed_without_all_budgets_borrows_the_mean_curve_at_its_own_height():
    losses = {T // 2: {1: 3.1, 2: 3.3}, T: {1: 3.0, 2: 3.1, 3: 3.4}, 2 * T: {1: 2.7, 2: 2.9}, 4 * T: {}}
    found = curves(losses, T)
    assert found[1] == Curve(tokens=(T // 2, T, 2 * T), losses=(3.1, 3.0, 2.7))
    assert found[3].tokens == (T // 2, T, 2 * T)  # nobody has run 4 T
    assert found[3].losses == pytest.approx((3.4 + 0.15, 3.4, 3.4 - 0.25))
    assert found[3].shifted == (T // 2, 2 * T)
    assert set(curves(losses, T, without=1)) == {2, 3}
    assert curves(losses, T, without=1)[3].losses == pytest.approx((3.4 + 0.2, 3.4, 3.4 - 0.2))
    mean_of_all = mean_curve(losses, T)
    assert mean_of_all is not None
    assert mean_of_all.losses == pytest.approx((9.95 / 3, 9.5 / 3, 8.75 / 3))
    assert mean_curve({T // 2: {1: 3.1}}, T) is None


def ladder(seeds: tuple[int, ...], luck: dict[int, float] | None = None) -> dict[int, dict[int, float]]:
    """A baseline that loses half a nat with each doubling from T/2 to 4 T."""
    luck = luck or {}
    budgets = {T // 2: 3.5, T: 3.0, 2 * T: 2.5, 4 * T: 2.0}
    return {tokens: {seed: loss + luck.get(seed, 0.0) for seed in seeds} for tokens, loss in budgets.items()}


def known(found: Speedup) -> Estimate:
    assert found.tokens is not None
    return found.tokens


def test_a_speedup_by_hand():
    found = speedup({1: 2.5, 2: 2.75, 3: 2.5}, T, ladder((1, 2, 3)))  # 2, sqrt 2 and 2 times
    logs = [math.log(2), math.log(2) / 2, math.log(2)]
    expected = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    assert known(found).value == pytest.approx(2 ** (5 / 6))
    assert known(found).low == pytest.approx(math.exp(expected.low))
    assert known(found).high == pytest.approx(math.exp(expected.high))
    assert found.seeds == (1, 2, 3)
    assert found.claim  # [1.08, 2.93]


def test_the_luck_of_a_seed_drops_out():
    luck = {1: 0.9, 2: -0.4, 3: 0.0}
    found = speedup({seed: 2.75 + lucky for seed, lucky in luck.items()}, T, ladder((1, 2, 3), luck))
    low, high = known(found).low, known(found).high
    assert (known(found).value, low, high) == pytest.approx((math.sqrt(2),) * 3)
    assert found.claim


def test_the_baseline_against_itself_is_one():
    losses = ladder((1, 2, 3), {1: 0.2, 3: -0.1})
    found = speedup(losses[T], T, losses)
    assert known(found) == Estimate(value=1.0, low=1.0, high=1.0, n=3)
    assert not found.claim


def test_only_common_seeds_count():
    found = speedup({1: 2.5, 5: 2.5}, T, ladder((1, 2)))
    assert found.seeds == (1,)
    assert known(found) == Estimate(value=pytest.approx(2.0), low=None, high=None, n=1)
    assert not found.claim
    assert speedup({5: 2.5}, T, ladder((1, 2))) == Speedup(tokens=None, claim=False, seeds=(), shifted=())


def test_better_than_all_budgets_is_at_least_the_longest():
    found = speedup({1: 1.9, 2: 1.8, 3: 1.95}, T, ladder((1, 2, 3)))
    assert known(found) == Estimate(value=pytest.approx(4.0), low=None, high=None, n=3, bound="at least")
    assert found.claim  # the losses at T differ beyond doubt
    few = speedup({1: 1.9}, T, ladder((1, 2, 3)))
    assert known(few).bound == "at least"
    assert not few.claim


def test_worse_than_all_budgets_is_at_most_the_shortest():
    found = speedup({1: 3.6, 2: 3.7, 3: math.inf}, T, ladder((1, 2, 3)))
    assert known(found) == Estimate(value=pytest.approx(0.5), low=None, high=None, n=3, bound="at most")
    assert not found.claim  # a diverged run has no difference
    assert speedup({1: 3.6, 2: 3.7, 3: 3.65}, T, ladder((1, 2, 3))).claim


def test_some_seeds_beyond_make_the_whole_a_bound():
    found = speedup({1: 1.9, 2: 2.5}, T, ladder((1, 2)))  # at least 4, and 2
    assert known(found) == Estimate(value=pytest.approx(math.sqrt(8)), low=None, high=None, n=2, bound="at least")
    assert not found.claim  # -1.1 and -0.5: too far apart for two seeds
    assert speedup({1: 1.9, 2: 3.9}, T, ladder((1, 2))).tokens is None  # beyond on both sides


def test_a_claim_wants_an_interval_without_one():
    slower = speedup({1: 3.1, 2: 3.12, 3: 3.08}, T, ladder((1, 2, 3)))
    assert known(slower).high is not None
    assert slower.claim
    assert known(slower).value < 1.0
    assert not speedup({1: 2.9, 2: 3.06, 3: 2.96}, T, ladder((1, 2, 3))).claim


def test_one_over_another_by_hand():
    """Worth 2, sqrt 2 and 2 times the tokens, against sqrt 2, 1 and 1; the luck of a seed is the baseline's, too."""
    luck = {1: 0.9, 2: -0.4, 3: 0.0}
    ours, theirs = {1: 3.4, 2: 2.35, 3: 2.5, 4: 2.0}, {1: 3.65, 2: 2.6, 3: 3.0}
    found = over(ours, theirs, T, ladder((1, 2, 3), luck))
    logs = [math.log(2) / 2, math.log(2) / 2, math.log(2)]
    expected = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    assert found is not None
    assert (found.value, found.low, found.high, found.n) == (
        pytest.approx(2 ** (2 / 3)),
        pytest.approx(math.exp(expected.low)),
        pytest.approx(math.exp(expected.high)),
        3,
    )


def test_nobody_is_ahead_of_who_is_beyond_the_baseline():
    inside, beyond = {1: 2.5, 2: 2.6}, {1: 1.9, 2: 2.6}
    baseline = ladder((1, 2))
    assert over(inside, beyond, T, baseline) is None
    assert over(beyond, inside, T, baseline) is None
    assert over(inside, {3: 2.5}, T, baseline) is None


@pytest.mark.parametrize(("complete", "seeds"), [(3, 3), (3, 6)], ids=["three seeds", "three of six with all budgets"])
def test_who_is_ahead_is_held_as_often_as_it_is_said(complete, seeds):
    """1.5 against 1.3."""
    rng, held, studies = random.Random(14), 0, 800
    for _ in range(studies):
        ours, _, baseline, another = _study(rng, 1.5, complete, seeds, other=1.3)
        found = over(ours, another, T, baseline)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1.5 / 1.3 <= found.high
    assert 0.92 <= held / studies <= 0.98


@pytest.mark.parametrize(
    ("truth", "complete", "seeds"),
    [(1.0, 6, 6), (1.3, 3, 3), (2.0, 3, 6), (2.0, 6, 6)],
    ids=["none", "three seeds", "three of six with all budgets", "six seeds"],
)
def test_intervals_hold_the_truth_as_often_as_they_say(truth, complete, seeds):
    """L(D) = 1.5 + 1.5 (D/T)^-0.08, luck of the seed that is common to all, luck of the run that is not."""
    rng, held, studies = random.Random(11), 0, 1500
    for _ in range(studies):
        found = speedup(*_study(rng, truth, complete, seeds))
        low, high = known(found).low, known(found).high
        assert low is not None
        assert high is not None
        held += low <= truth <= high
    assert 0.93 <= held / studies <= 0.97


def test_intervals_in_time_hold_the_truth_at_least_as_often():
    """The price of a token, 1.1, is the median of twelve rounds that vary by 3 %."""
    rng, held, studies = random.Random(13), 0, 1000
    for _ in range(studies):
        rounds = [1.1 * math.exp(rng.gauss(0, 0.03)) for _ in range(12)]
        low, high = median_interval(rounds)
        price = Estimate(value=statistics.median(rounds), low=low, high=high, n=12)
        seconds = divided(known(speedup(*_study(rng, 1.3, 6, 6))), price)
        assert seconds.low is not None
        assert seconds.high is not None
        held += seconds.low <= 1.3 / 1.1 <= seconds.high
    assert 0.94 <= held / studies <= 0.995


def test_a_null_result_is_rarely_claimed():
    rng = random.Random(12)
    claims = sum(speedup(*_study(rng, 1.0, 3, 6)).claim for _ in range(1500))
    assert 0.03 <= claims / 1500 <= 0.07


def _study(rng: random.Random, truth: float, complete: int, seeds: int, other: float | None = None) -> Any:
    """Final losses, T, and the baseline's; also those of another optimizer, if it is worth something."""

    def loss(budget: float, seed: int) -> float:
        return 1.5 + 1.5 * budget**-0.08 + luck[seed] + rng.gauss(0, 0.006)

    luck = {seed: rng.gauss(0, 0.02) for seed in range(1, seeds + 1)}
    baseline = {
        int(share * T): {seed: loss(share, seed) for seed in luck if share <= 1 or seed <= complete}
        for share in (0.5, 1.0, 2.0, 4.0)
    }
    ours = {seed: loss(truth, seed) for seed in luck}
    return (ours, T, baseline) if other is None else (ours, T, baseline, {seed: loss(other, seed) for seed in luck})
