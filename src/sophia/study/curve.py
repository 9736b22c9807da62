"""The baseline's loss by budget, L(D), each point from runs with a full schedule of that length, and its inverse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sophia.study.statistics import Bound

Losses = Mapping[int, Mapping[int, float]]
"""Final losses of the baseline: budget in tokens -> seed -> nats a token. A run that diverged has none: to leave it out
favours the baseline."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """L(D) of one seed: linear in log D between the budgets that were run, nothing beyond them."""

    tokens: tuple[int, ...]
    """Budgets, rising."""
    losses: tuple[float, ...]
    """Final loss of each."""
    shifted: tuple[int, ...] = ()
    """Budgets that this seed has no run at: the other seeds' mean difference to budget T, added to its loss at T."""

    def tokens_for(self, loss: float) -> tuple[float, Bound | None]:
        """D(loss), the least D at which the curve has come down to the loss.

        The least, so that a rise between two budgets counts for the baseline. Outside of what was measured the nearest
        budget comes back as a bound: the baseline needs "at least" or "at most" that.
        """
        if loss > self.losses[0]:
            return float(self.tokens[0]), "at most"
        if loss == self.losses[0]:
            return float(self.tokens[0]), None
        for place in range(1, len(self.tokens)):
            above, below = self.losses[place - 1], self.losses[place]
            if below == loss:
                return float(self.tokens[place]), None  # exactly: an optimizer may be the baseline under another name
            if below < loss:
                part = (above - loss) / (above - below)
                return self.tokens[place - 1] * (self.tokens[place] / self.tokens[place - 1]) ** part, None
        return float(self.tokens[-1]), "at least"

    def rises(self) -> tuple[tuple[int, int], ...]:
        """Neighbouring budgets of which the larger has no lower loss."""
        pairs = zip(self.tokens, self.tokens[1:], self.losses, self.losses[1:], strict=False)
        return tuple((smaller, larger) for smaller, larger, before, after in pairs if after >= before)


def curves(losses: Losses, anchor: int, *, without: int | None = None) -> dict[int, Curve]:
    """Each seed's curve.

    Args:
        losses: Of the baseline; not all seeds need have all budgets.
        anchor: Budget T. A seed has a curve when it has a loss there.
        without: A seed that is left out everywhere, for the jackknife.
    """
    kept = {tokens: {s: x for s, x in found.items() if s != without} for tokens, found in sorted(losses.items())}
    at_anchor = kept.get(anchor, {})
    return {seed: _curve(kept, at_anchor, seed) for seed in sorted(at_anchor)}


def mean_curve(losses: Losses, anchor: int) -> Curve | None:
    """The mean over all seeds' curves; None before there is one.

    A mean over whatever runs a budget has would mix the difference of budgets with that of seeds.
    """
    found = list(curves(losses, anchor).values())
    if not found:
        return None
    means = tuple(_mean(at_budget) for at_budget in zip(*(curve.losses for curve in found), strict=True))
    return Curve(tokens=found[0].tokens, losses=means)


def _curve(losses: Losses, at_anchor: Mapping[int, float], seed: int) -> Curve:
    points: list[tuple[int, float]] = []
    shifted = []
    for tokens, found in losses.items():
        if seed in found:
            points.append((tokens, found[seed]))
        elif both := [found[other] - at_anchor[other] for other in found.keys() & at_anchor.keys()]:
            points.append((tokens, at_anchor[seed] + _mean(both)))
            shifted.append(tokens)
    return Curve(
        tokens=tuple(tokens for tokens, _ in points),
        losses=tuple(loss for _, loss in points),
        shifted=tuple(shifted),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(sorted(values)) / len(values)
