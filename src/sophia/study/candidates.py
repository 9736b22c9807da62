"""What a search has tried, and what it found."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction

from sophia.study.runs import Settings, Value, settings

_DIGITS = 3


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Settings that were tried, or are to be."""

    settings: Settings
    """The learning rate among them."""
    why: str
    """The rule that asked for them: "grid", "edge", the name of a setting, or "refine"."""
    loss: float | None
    """Infinite: diverged. None: not known yet."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """How far a search is."""

    candidates: tuple[Candidate, ...]
    """In the order in which the rule asks for them; those without a loss are wanted now."""
    done: bool
    """Whether the rule asks for nothing more."""
    best: Settings | None
    """Of the lowest loss, the earliest of equals; None until the search is done, or where all diverged."""
    edges: tuple[str, ...]
    """What the search could not settle, as sentences; empty until it is done."""


def rate_of(known: Settings) -> float:
    """The learning rate of settings."""
    lr = dict(known)["lr"]
    assert isinstance(lr, float)
    return lr


def rate(lr: float, factor: float, exponent: Fraction = Fraction(1)) -> float:
    """``lr`` times a power of the factor, in three digits.

    Decimal arithmetic gives the same digits on every machine, so that the ids of runs do not depend on it.
    """
    if exponent == 0 or factor == 1.0:
        return lr
    context = Context(prec=28)
    power = context.power(Decimal(repr(factor)), context.divide(Decimal(exponent.numerator), exponent.denominator))
    exact = context.multiply(Decimal(repr(lr)), power)
    return float(Context(prec=_DIGITS).plus(exact))


def changed(known: Settings, **values: Value) -> Settings:
    """Settings with some of them replaced or added."""
    return settings(**{**dict(known), **values})


def best_of(candidates: Iterable[Candidate]) -> Candidate | None:
    """The lowest loss, the earliest of equals; None where all diverged."""
    known = [(one.loss, number, one) for number, one in enumerate(candidates) if one.loss is not None]
    loss, _, best = min(known, key=lambda one: one[:2])
    return best if math.isfinite(loss) else None


def conclude(candidates: tuple[Candidate, ...], *, done: bool, more: Sequence[str] = ()) -> Found:
    """What a search found, from all its candidates; ``more`` are edges of settings other than the learning rate."""
    if not done:
        return Found(candidates=candidates, done=False, best=None, edges=())
    best = best_of(candidates)
    if best is None:
        return Found(candidates=candidates, done=True, best=None, edges=("every run of the search diverged",))
    return Found(candidates=candidates, done=True, best=best.settings, edges=(*_rate_edge(best, candidates), *more))


def _rate_edge(best: Candidate, tried: Sequence[Candidate]) -> tuple[str, ...]:
    """Whether a higher and a lower rate was tried, with whatever other settings."""
    lr, rates = rate_of(best.settings), [rate_of(one.settings) for one in tried]
    if min(rates) < lr < max(rates):
        return ()
    if min(rates) == max(rates):
        return (f"lr {lr:g} is the only one tried",)
    return (f"lr {lr:g} is the {'lowest' if lr == min(rates) else 'highest'} tried",)
