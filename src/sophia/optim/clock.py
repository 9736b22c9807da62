"""Time as the optimizer counts it: steps taken, and the phase of the curvature refreshes.

The numbers live in every `param_group`, because `torch.distributed.checkpoint` saves nothing else beside the state of
the parameters; group 0 is read, all are written.

Two things can hide t from the host. In a CUDA graph t is a counter on the device, one int64 tensor that all groups
share. And a step that the device skips, because gradients overflowed, does not count: the host then counts calls, the
device counts skips, and they are only settled when the answer could depend on it.
"""

from typing import Any

import torch
from torch import Tensor

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


class Skips:
    """Steps that the device may have skipped, and how many it has."""

    def __init__(self) -> None:
        self.calls = 0
        """Steps since the host last asked that the device was free to skip."""
        self.count: Tensor | None = None
        """How many of them it did skip, int64 on the device; None where there was no such step yet."""

    def note(self, found_inf: Tensor) -> None:
        """One more step, which is skipped where found_inf is not zero."""
        if self.count is None:
            self.count = torch.zeros((), dtype=torch.int64, device=found_inf.device)
        self.count += (found_inf != 0).to(self.count.device)
        self.calls += 1

    def take(self) -> int:
        """How many were skipped since the last call. Waits for the device if there was any such step."""
        skipped = int(self.count) if self.count is not None and self.calls else 0
        if self.count is not None and skipped:
            self.count.zero_()
        self.calls = 0
        return skipped


class Clock:
    """A view of the time fields of an optimizer's param groups."""

    def __init__(self, param_groups: list[dict[str, Any]], skips: Skips | None = None) -> None:
        self._groups = param_groups
        self._skips = skips or Skips()

    @property
    def time(self) -> int:
        """t: the number of steps taken. Waits for the device where the device counts them."""
        if self.on_device and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "capturable=True keeps the time on the device, which cannot be read while a CUDA graph is captured: "
                "call refresh_curvature() and read curvature_due between replays, and detach() an attached model"
            )
        self.settle()
        return int(self._groups[0]["clock"])

    @property
    def latest(self) -> int | Tensor:
        """t without waiting for anyone: a 0-D int64 tensor on the device where only the device knows."""
        counted: int | Tensor = self._groups[0]["clock"]
        if self._skips.calls and self._skips.count is not None:
            return counted - self._skips.count
        return counted

    @property
    def on_device(self) -> bool:
        """Whether t is a counter on the device."""
        return isinstance(self._groups[0]["clock"], Tensor)

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
    def accepted(self) -> int:
        """Refreshes accepted."""
        return int(self._groups[0]["accepted_refreshes"])

    @property
    def refused(self) -> int:
        """Refreshes refused because an estimate was not finite."""
        return int(self._groups[0]["refused_refreshes"])

    @property
    def attempted(self) -> bool:
        """Whether a refresh was ever accepted or refused."""
        return bool(self.accepted or self.refused)

    @property
    def due(self) -> bool:
        """Whether no refresh was accepted yet in the present block of k steps.

        Waits for the device where it counts the steps; else only if skipped steps could make a difference, which is
        once in k steps, and once more for each skip.
        """
        last = self.last_refresh
        if last < 0:
            return True
        block = last // self.interval
        if not self.on_device:
            most = int(self._groups[0]["clock"])
            if most // self.interval == block:
                return False
            if (most - self._skips.calls) // self.interval != block:
                return True
        return self.time // self.interval != block

    @property
    def last_refresh(self) -> int:
        """t of the last accepted refresh; -1 where there was none."""
        return int(self._groups[0]["last_refresh"])

    @property
    def age(self) -> int | Tensor:
        """Steps since the last accepted refresh, since the start where there was none; a tensor as `latest` is."""
        return self.latest - max(self.last_refresh, 0)

    @property
    def greatest_age(self) -> int:
        """The age if the device has skipped nothing, which the host knows; 0 where the device counts the steps."""
        return 0 if self.on_device else int(self._groups[0]["clock"]) - max(self.last_refresh, 0)

    def settle(self) -> None:
        """Take off the steps that the device skipped. Waits for the device if it was free to skip any."""
        if self._skips.calls:
            self._set(clock=self._groups[0]["clock"] - self._skips.take())

    def tick(self, found_inf: Tensor | None = None) -> None:
        """Count a step, unless found_inf, on the device, is not zero."""
        clock = self._groups[0]["clock"]
        if isinstance(clock, Tensor):  # in place: a CUDA graph knows it by its address
            clock += 1 if found_inf is None else (found_inf == 0).to(clock.device)
            return
        self._set(clock=clock + 1)
        if found_inf is not None:
            self._skips.note(found_inf)

    def accept(self) -> None:
        """Count an accepted refresh at the present step."""
        self._set(
            last_refresh=self.time, accepted_refreshes=self.accepted + 1, curvature_scale=min(1.0, self.scale * 2)
        )

    def refuse(self) -> None:
        """Count a refused refresh: it stays due, and is tried again at a lower scale."""
        self._set(refused_refreshes=self.refused + 1, curvature_scale=max(_LEAST_SCALE, self.scale / 4))

    def place(self, device: torch.device | None) -> None:
        """Keep t on this device from now on, or on the host: None. Without effect where it is there already."""
        clock = self._groups[0]["clock"]
        held = clock.device if isinstance(clock, Tensor) else None
        if held != device:
            time = self.time
            self._set(clock=time if device is None else torch.full((), time, dtype=torch.int64, device=device))
        elif held is not None:
            self._set(clock=clock)  # a distributed checkpoint gives every group a copy

    def _set(self, **fields: int | float | Tensor) -> None:
        for group in self._groups:
            group.update(fields)
