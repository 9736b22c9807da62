"""What keeps a long run from going to waste: bad numbers noticed at once, signals answered with a checkpoint."""

import collections
import contextlib
import math
import signal
import statistics
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

# Losses that make up the recent past; before half of them are there, nothing counts as a spike.
_WINDOW = 64
_LEAST_RISE = 0.1


class SpikeWatch:
    """Tells a loss that stands out of the recent ones: above their mean by so many standard deviations.

    It must also be a tenth of a nat above, since the losses of a converged run differ by very little.
    """

    def __init__(self, sigmas: float, recent: Sequence[float] = ()) -> None:
        self.sigmas = sigmas
        self._recent = collections.deque(recent, maxlen=_WINDOW)

    def is_spike(self, loss: float) -> bool:
        """Whether this loss is a spike; only others enter the recent past."""
        if len(self._recent) >= _WINDOW // 2:
            mean, deviation = statistics.fmean(self._recent), statistics.pstdev(self._recent)
            if loss > mean + max(self.sigmas * deviation, _LEAST_RISE):
                return True
        if math.isfinite(loss):
            self._recent.append(loss)
        return False

    def state(self) -> list[float]:
        """The recent losses, for a checkpoint."""
        return list(self._recent)


class Signals:
    """SIGINT and SIGTERM since training began: the first asks for a checkpoint, a SIGINT after it ends at once."""

    def __init__(self) -> None:
        self.received = 0

    @contextlib.contextmanager
    def caught(self) -> Iterator["Signals"]:
        """Answer signals here instead of dying by them."""
        previous: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # raised in threads other than the main one, which alone gets signals
            for asked in (signal.SIGINT, signal.SIGTERM):
                previous[asked] = signal.signal(asked, self._answer)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
