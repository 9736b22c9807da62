"""Speed-up in tokens: what the baseline would have needed for the same loss, over what was needed."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from sophia.study.curve import Curve, Losses, curves
from sophia.study.statistics import Bound, Estimate, difference, exponential, mean

_Kept: TypeAlias = Callable[[Mapping[int, float]], Mapping[int, float]]
"""Takes losses by seed, and gives those of the seeds that count."""


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """How an optimizer compares with the baseline at one budget."""

    tokens: Estimate | None
    """D_baseline(loss)/D; None before both have a seed in common, and where the seeds lie beyond the baseline's range
    on both sides."""
    claim: bool
    """Whether it may be said to differ from 1."""
    seeds: tuple[int, ...]
    """Those that both have."""
    shifted: tuple[int, ...]
    """Those whose curve of the baseline is partly that of other seeds."""


def speedup(ours: Mapping[int, float], tokens: int, baseline: Losses) -> Speedup:
    """Compare by seed, on the scale of logarithms.

    Args:
        ours: Final loss by seed, of runs with budget ``tokens``; infinite for one that diverged.
        tokens: Our budget, which the baseline must have been run at, too.
        baseline: Its final losses by budget and seed.
    """
    found = curves(baseline, tokens)
    seeds = tuple(sorted(ours.keys() & found.keys()))
    shifted = tuple(seed for seed in seeds if found[seed].shifted)
    if not seeds:
        return Speedup(tokens=None, claim=False, seeds=(), shifted=())
    logs, bounds = _logs({seed: ours[seed] for seed in seeds}, tokens, found)
    if len(bounds) > 1:
        return Speedup(tokens=None, claim=False, seeds=seeds, shifted=shifted)
    if bounds:
        (bound,) = bounds
        estimate = exponential(_without_interval(logs, bound))
        claim = _claim_by_loss(ours, baseline[tokens], bound, estimate.value)
    else:
        estimate = exponential(
            _interval(logs, lambda found, kept: _logs(kept(ours), tokens, found)[0], tokens, baseline, bool(shifted))
        )
        claim = not estimate.holds(1.0)
    return Speedup(tokens=estimate, claim=claim, seeds=seeds, shifted=shifted)


def _logs(
    ours: Mapping[int, float], tokens: int, found: Mapping[int, Curve]
) -> tuple[dict[int, float], frozenset[Bound]]:
    """Logarithms of the speed-up by seed, a bound's where the truth lies beyond it; which bounds there were."""
    logs: dict[int, float] = {}
    bounds: set[Bound] = set()
    for seed, loss in ours.items():
        needed, bound = found[seed].tokens_for(loss)
        logs[seed] = math.log(needed / tokens)
        if bound is not None:
            bounds.add(bound)
    return logs, frozenset(bounds)


def over(ours: Mapping[int, float], theirs: Mapping[int, float], tokens: int, baseline: Losses) -> Estimate | None:
    """Our speed-up over another's at the same budget, seed by seed: the luck of the baseline's curve drops out.

    Args:
        ours: Final loss by seed, of runs with budget ``tokens``.
        theirs: The other's.
        tokens: The budget, which the baseline must have been run at, too.
        baseline: Its final losses by budget and seed.

    Returns:
        The ratio of the speed-ups; None where one of them is only a bound, or no seed is common to all.
    """
    found = curves(baseline, tokens)
    seeds = tuple(sorted(ours.keys() & theirs.keys() & found.keys()))

    def worth(found: Mapping[int, Curve], kept: _Kept) -> dict[int, float]:
        mine, others = (_logs(kept(losses), tokens, found)[0] for losses in (ours, theirs))
        return {seed: mine[seed] - others[seed] for seed in mine}

    common = functools.partial(_only, seeds)
    if not seeds or any(_logs(common(losses), tokens, found)[1] for losses in (ours, theirs)):
        return None
    shifted = any(found[seed].shifted for seed in seeds)
    return exponential(_interval(worth(found, common), worth, tokens, baseline, shifted))


def _interval(
    logs: Mapping[int, float],
    worth: Callable[[Mapping[int, Curve], _Kept], Mapping[int, float]],
    tokens: int,
    baseline: Losses,
    shifted: bool,
) -> Estimate:
    """The t-interval over seeds; over the jackknife's pseudo-values where seeds share a part of their curves.

    A curve that is lent to other seeds is one piece of luck in several values, so that their spread tells too little.
    The jackknife leaves out one seed everywhere and sees what becomes of the mean. Where nothing is lent, its
    pseudo-values n·θ - (n-1)·θ₋ᵢ are the values themselves.

    Args:
        logs: The values.
        worth: Gives those of some seeds anew, from curves of the baseline.
        tokens: Budget T.
        baseline: What curves are made of.
        shifted: Whether some seeds have curves that are partly those of others.
    """
    plain = mean(list(logs.values()))
    assert plain is not None
    n = len(logs)
    if not shifted or n < 2:
        return plain
    pseudo = []
    for left_out in logs:
        rest = sorted(logs.keys() - {left_out})
        others = worth(curves(baseline, tokens, without=left_out), functools.partial(_only, rest))
        pseudo.append(n * plain.value - (n - 1) * (math.fsum(others.values()) / len(others)))
    jackknife = mean(pseudo)
    assert jackknife is not None
    assert jackknife.low is not None
    half = jackknife.value - jackknife.low
    return replace(plain, low=plain.value - half, high=plain.value + half)


def _only(seeds: Sequence[int], losses: Mapping[int, float]) -> Mapping[int, float]:
    return {seed: losses[seed] for seed in seeds}


def _without_interval(logs: Mapping[int, float], bound: Bound) -> Estimate:
    value = math.fsum(logs.values()) / len(logs)
    return Estimate(value=value, low=None, high=None, n=len(logs), bound=bound)


def _claim_by_loss(ours: Mapping[int, float], theirs: Mapping[int, float], bound: Bound, value: float) -> bool:
    """Whether losses at the same budget differ, in the direction of the bound: values cut off have no interval."""
    if any(math.isinf(loss) for loss in [*ours.values(), *theirs.values()]):
        return False
    apart = difference(ours, theirs)
    if apart is None or apart.holds(0.0):
        return False
    return apart.value < 0 <= math.log(value) if bound == "at least" else apart.value > 0 >= math.log(value)
