"""What keeps a long run from going to waste: bad numbers noticed at once, signals answered with a checkpoint."""

import collections
import contextlib
import math
import signal
import statistics
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

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


class Readings:
    """Loss and gradient norm of the steps that no guard has looked at yet; they stay on the device until one does."""

    def __init__(self, read: Sequence[Sequence[float]] = ()) -> None:
        """Begin with what an earlier session left: pairs of loss and gradient norm, the oldest first."""
        self._read: list[tuple[float, float]] = [(loss, norm) for loss, norm in read]
        self._unread: list[Tensor] = []

    def add(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Keep those of one more step, without waiting for them.

        Args:
            loss: Of the global batch, 0-D.
            norm: Of its gradient, 0-D, on the same device.

        Returns:
            1.0 when one of them is not finite, else 0.0: 0-D, fp32, on that device.
        """
        pair = torch.stack((loss, norm.to(loss.dtype)))
        self._unread.append(pair)
        return pair.isfinite().all().logical_not().to(torch.float32)

    def read(self) -> list[tuple[float, float]]:
        """Loss and gradient norm of each step, the oldest first; waits for the device, once for all of them."""
        if self._unread:
            self._read += [(loss, norm) for loss, norm in torch.stack(self._unread).tolist()]
            self._unread = []
        return self._read

    def take(self) -> list[tuple[float, float]]:
        """Read all, and forget them."""
        taken, self._read = self.read(), []
        return taken


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
