"""Means and intervals: two-sided, 95 %, Student's t over seeds."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy import special  # type: ignore[import-untyped]

CONFIDENCE = 0.95
"""Of every interval."""

Bound = Literal["at least", "at most"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its uncertainty."""

    value: float
    """The mean; of ratios the geometric one."""
    low: float | None
    """Lower end of the interval; None where there is none: a single value, or a bound."""
    high: float | None
    """Upper end."""
    n: int
    """Values that it is made from."""
    bound: Bound | None = None
    """Whether the value is only a limit, because the truth lies beyond what was measured."""

    def holds(self, number: float) -> bool:
        """Whether the interval does not exclude this number; without an interval nothing is excluded."""
        return self.low is None or self.high is None or self.low <= number <= self.high


def quantile(n: int) -> float:
    """Student's t for the interval of a mean of n values."""
    return float(special.stdtrit(n - 1, 0.5 + CONFIDENCE / 2))


def mean(values: Sequence[float]) -> Estimate | None:
    """The mean x̄ ± t · s/√n; None of no values, no interval for one."""
    n = len(values)
    if n == 0:
        return None
    value = math.fsum(values) / n
    if n == 1:
        return Estimate(value=value, low=None, high=None, n=1)
    half = quantile(n) * statistics.stdev(values, value) / math.sqrt(n)
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """The mean of ours - theirs over the seeds of both: what a seed does to both of them drops out."""
    return mean([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval of the median whatever the distribution, by ranks: the j-th least and the j-th greatest value.

    The median lies below the j-th least of n with probability P(B < j), B binomial of n and 1/2. j is the largest for
    which the interval is of the confidence; with fewer than 6 values, none is, and their whole range comes back.
    """
    n, outside, rank = len(values), 1, 1  # outside / 2**n: the chance to lie below the rank-th least
    while rank <= n // 2 and 2 * (outside + math.comb(n, rank)) <= (1 - CONFIDENCE) * 2**n:
        outside += math.comb(n, rank)
        rank += 1
    ordered = sorted(values)
    return ordered[rank - 1], ordered[n - rank]


def exponential(logs: Estimate) -> Estimate:
    """From logarithms to ratios."""
    low = None if logs.low is None else math.exp(logs.low)
    high = None if logs.high is None else math.exp(logs.high)
    return replace(logs, value=math.exp(logs.value), low=low, high=high)


def divided(speedup: Estimate, ratio: Estimate) -> Estimate:
    """A speed-up in tokens by the ratio of what a token costs: the speed-up in that currency.

    Both uncertainties count. On the scale of logarithms each side's half-widths add up in quadrature, speed-up's lower
    with ratio's upper and the other way round ("MOVER", Donner and Zou 2012, for two independent estimates).
    """
    value = speedup.value / ratio.value
    if speedup.low is None or speedup.high is None:
        return replace(speedup, value=value)
    return replace(
        speedup,
        value=value,
        low=value / _apart(speedup.value, speedup.low, ratio.value, ratio.high),
        high=value * _apart(speedup.value, speedup.high, ratio.value, ratio.low),
    )


def _apart(first: float, first_end: float, second: float, second_end: float | None) -> float:
    """The factor between a quotient and its end."""
    widths = math.log(first_end / first), math.log((second if second_end is None else second_end) / second)
    return math.exp(math.hypot(*widths))
