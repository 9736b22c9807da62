"""Time as the optimizer counts it: steps taken, and the phase of the curvature refreshes.

The numbers live in every `param_group`, because `torch.distributed.checkpoint` saves nothing else beside the state of
the parameters; group 0 is read, all are written.
"""

from typing import Any

# Names in a param group, with the values of a new optimizer.
FIELDS: dict[str, int | float] = {
    "curvature_interval": 10,
    "seed": 0,
    "clock": 0,
    "last_refresh": -1,
    "accepted_refreshes": 0,
    "refused_refreshes": 0,
    "curvature_scale": 1.0,
}


# Low enough for fp16 gradients of the sum over many thousand predictions, high enough that they do not underflow to
# zero: zero curvature is accepted, and means sign-momentum.
_LEAST_SCALE = 2.0**-8


class Clock:
    """A view of the time fields of an optimizer's param groups."""

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self._groups = param_groups

    @property
    def time(self) -> int:
        """t: the number of steps taken."""
        return int(self._groups[0]["clock"])

    @property
    def interval(self) -> int:
        """k: steps from one due refresh to the next."""
        return int(self._groups[0]["curvature_interval"])

    @property
    def seed(self) -> int:
        """The seed of the estimates' noise."""
        return int(self._groups[0]["seed"])

    @property
    def scale(self) -> float:
        """Factor on the sampled loss, a power of two: lowered when fp16 gradients overflow, exact otherwise."""
        return float(self._groups[0]["curvature_scale"])

    @property
    def refused(self) -> int:
        """Refreshes refused because an estimate was not finite."""
        return int(self._groups[0]["refused_refreshes"])

    @property
    def attempted(self) -> bool:
        """Whether a refresh was ever accepted or refused."""
        return bool(self._groups[0]["accepted_refreshes"] or self._groups[0]["refused_refreshes"])

    @property
    def due(self) -> bool:
        """Whether no refresh was accepted yet in the present block of k steps."""
        last = int(self._groups[0]["last_refresh"])
        return last < 0 or last // self.interval != self.time // self.interval

    @property
    def age(self) -> int:
        """Steps since the last accepted refresh; since the start where there was none."""
        return self.time - max(int(self._groups[0]["last_refresh"]), 0)

    def tick(self) -> None:
        """Count a step."""
        self._set(clock=self.time + 1)

    def accept(self) -> None:
        """Count an accepted refresh at the present step."""
        accepted = int(self._groups[0]["accepted_refreshes"]) + 1
        self._set(last_refresh=self.time, accepted_refreshes=accepted, curvature_scale=min(1.0, self.scale * 2))

    def refuse(self) -> None:
        """Count a refused refresh: it stays due, and is tried again at a lower scale."""
        self._set(refused_refreshes=self.refused + 1, curvature_scale=max(_LEAST_SCALE, self.scale / 4))

    def _set(self, **fields: int | float) -> None:
        for group in self._groups:
            group.update(fields)
