"""The search that is equal for all optimizers: which settings to try next, given the losses so far (docs/protocol.md).

It is a pure function, computed from the start each time: a search that was interrupted goes on as if it had not been,
and an optimizer that enters later is searched as the others were.

Learning rates are powers of the study's factor times the first one. Whole exponents are the grid; halves, quarters, …
refine it. Exponents, not numbers, say what has been tried: a rate that is reached by another way is the same rate.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

from sophia.study.beyond import beyond, is_end, is_number
from sophia.study.candidates import Candidate, Found, best_of, changed, conclude, rate, rate_of
from sophia.study.runs import Settings, Value

# The finest step between two learning rates, in powers of the factor: finer ones would be the same three digits.
_FINEST = Fraction(1, 16)
_EXTENSIONS = 2

Lookup = Callable[[Settings], float | None]
"""Settings -> loss: infinite where the run diverged, None where there is none yet."""
Allowed = Callable[[Settings], bool]


def search(
    *,
    lr: float,
    others: Settings,
    options: Sequence[tuple[str, Sequence[Value]]],
    trials: int,
    factor: float,
    loss_of: Lookup,
    allowed: Allowed = lambda _: True,
) -> Found:
    """An entry's search at the budget T: exactly ``trials`` runs.

    Args:
        lr: Where the grid of learning rates begins.
        others: All other settings.
        options: Settings to search beside the learning rate, each with the values to try.
        trials: Runs, at least 3.
        factor: Between neighbouring learning rates.
        loss_of: Losses so far.
        allowed: Whether settings could be run: an extension never leaves a setting's range.
    """
    walk = _Walk(lr=lr, factor=factor, limit=trials, loss_of=loss_of, allowed=allowed)
    try:
        walk.rates(_grid(3), others)
        walk.extend_rates(others)
        for name, values in options:
            walk.option(name, values)
        walk.refine()
    except _Waiting:
        return walk.found(done=False)
    return walk.found(done=True)


def retune(*, settings: Settings, rates: int, factor: float, loss_of: Lookup) -> Found:
    """A short search at another budget or batch: learning rates around one, at most 2 more beyond the edge.

    Args:
        settings: The best at T, with the learning rate in the middle.
        rates: Learning rates of the grid, at least 1.
        factor: Between neighbouring learning rates.
        loss_of: Losses so far.
    """
    others = tuple(pair for pair in settings if pair[0] != "lr")
    limit = rates + _EXTENSIONS if rates > 1 else 1
    walk = _Walk(lr=rate_of(settings), factor=factor, limit=limit, loss_of=loss_of, allowed=lambda _: True)
    try:
        walk.rates(_grid(rates), others)
        walk.extend_rates(others)
    except _Waiting:
        return walk.found(done=False)
    return walk.found(done=True)


def scan(*, settings: Settings, factors: Sequence[float], loss_of: Lookup) -> Found:
    """The learning rate of ``settings`` times each factor, and nothing beyond."""
    asked = dict.fromkeys(changed(settings, lr=rate(rate_of(settings), factor)) for factor in factors)
    candidates = tuple(Candidate(settings=one, why="grid", loss=loss_of(one)) for one in asked)
    return conclude(candidates, done=all(one.loss is not None for one in candidates))


class _Waiting(Exception):
    """The next step of the rule depends on losses that are not there yet."""


class _Walk:
    """The steps of a search, as far as losses are known."""

    def __init__(self, *, lr: float, factor: float, limit: int, loss_of: Lookup, allowed: Allowed) -> None:
        self._lr = lr
        self._factor = factor
        self._limit = limit
        self._loss_of = loss_of
        self._allowed = allowed
        self._made: dict[Settings, Candidate] = {}
        self._exponents: dict[Settings, Fraction] = {}
        self._open: list[str] = []

    @property
    def left(self) -> int:
        """Runs that may still be asked for."""
        return self._limit - len(self._made)

    def rates(self, exponents: Iterable[Fraction], others: Settings) -> None:
        """The grid."""
        self._ask([(exponent, others) for exponent in exponents], "grid")

    def extend_rates(self, others: Settings) -> None:
        """While the best learning rate is the outermost, one beyond it; while all diverge, a lower one."""
        while self.left:
            best = self._best()
            tried = sorted(self._exponents.values())
            own = tried[0] if best is None else self._exponents[best.settings]
            if own == tried[0]:
                self._ask([(tried[0] - 1, others)], "edge")
            elif own == tried[-1]:
                self._ask([(tried[-1] + 1, others)], "edge")
            else:
                return

    def option(self, name: str, values: Sequence[Value]) -> None:
        """The values of one setting, at the best so far; then beyond the outermost while that is the best."""
        best = self._best()
        if best is None or not self.left:
            self._open.append(f"{name} was not searched: the trials were spent before")
            return
        # The value that it has is among those made already.
        asked = {value: changed(best.settings, **{name: value}) for value in values}
        self._ask([(self._exponents[best.settings], _others(one)) for one in asked.values()], name)
        missing = [f"{value}" for value, one in asked.items() if one not in self._made]
        if missing:
            self._open.append(f"{name} was not searched at {', '.join(missing)}: the trials were spent before")
        while self._extend(name):
            pass

    def _extend(self, name: str) -> bool:
        best = self._best()
        assert best is not None
        value = dict(best.settings).get(name)
        line = sorted(v for v in (dict(one).get(name) for one in self._line(name, best.settings)) if is_number(v))
        if not is_number(value) or len(line) < 2 or value not in (line[0], line[-1]):
            return False
        following = beyond(name, value, line[1] if value == line[0] else line[-2])
        if following is None and value == line[0] and is_end(value):
            return False
        where = f"{name} {value:g} is the {'lowest' if value == line[0] else 'highest'} tried"
        wanted = None if following is None else changed(best.settings, **{name: following})
        if wanted is None or not self._allowed(wanted):
            self._open.append(f"{where}, at the end of its range")
            return False
        if not self.left:
            self._open.append(f"{where}: the trials were spent")
            return False
        self._ask([(self._exponents[best.settings], _others(wanted))], name)
        return True

    def refine(self) -> None:
        """What is left goes to learning rates around the best, ever closer."""
        step = Fraction(1, 2)
        while self.left:
            best = self._best()
            assert best is not None  # while all diverge, lower rates take every run
            own, others = self._exponents[best.settings], _others(best.settings)
            sides = [one for one in (own - step, own + step) if self._settings(one, others) not in self._made]
            if sides:
                sides.sort(key=lambda one: self._beside(one, own, others))
                self._ask([(one, others) for one in sides], "refine")
            elif step > _FINEST:
                step /= 2
            else:  # nothing between is left: what is outside has never been needed, but trials are equal for all
                tried = sorted(self._exponents.values())
                self._ask([(tried[0] - 1, others), (tried[-1] + 1, others)], "refine")

    def found(self, *, done: bool) -> Found:
        """The state of the search."""
        return conclude(tuple(self._made.values()), done=done, more=self._open)

    def _ask(self, points: Sequence[tuple[Fraction, Settings]], why: str) -> None:
        for exponent, others in points:
            wanted = self._settings(exponent, others)
            if wanted not in self._made and self.left:
                self._made[wanted] = Candidate(settings=wanted, why=why, loss=self._loss_of(wanted))
                self._exponents[wanted] = exponent
        if any(one.loss is None for one in self._made.values()):
            raise _Waiting

    def _settings(self, exponent: Fraction, others: Settings) -> Settings:
        return changed(others, lr=rate(self._lr, self._factor, exponent))

    def _best(self) -> Candidate | None:
        return best_of(self._made.values())

    def _line(self, name: str, through: Settings) -> list[Settings]:
        """What was tried that differs from these settings in one of them at most."""
        rest = _without(through, name)
        return [one for one in self._made if _without(one, name) == rest]

    def _beside(self, side: Fraction, own: Fraction, others: Settings) -> float:
        """The loss of the nearest rate on one side, at these settings if there is one: the lower promises more."""
        there = [one for one, e in self._exponents.items() if (e < own) == (side < own) and e != own]
        same = [one for one in there if _others(one) == others]
        nearest = min(same or there, key=lambda one: abs(self._exponents[one] - own), default=None)
        loss = None if nearest is None else self._made[nearest].loss
        return -math.inf if loss is None else loss


def _grid(count: int) -> list[Fraction]:
    """So many whole exponents, from the middle outwards."""
    return sorted((Fraction(one) for one in range(-(count // 2), (count - 1) // 2 + 1)), key=abs)


def _others(known: Settings) -> Settings:
    return _without(known, "lr")


def _without(known: Settings, name: str) -> Settings:
    return tuple(pair for pair in known if pair[0] != name)
