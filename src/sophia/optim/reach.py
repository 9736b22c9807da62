"""Which parameters the curvature has reached: the others hold still, and are named once."""

import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from sophia.optim.clock import Clock
from sophia.optim.dtensor import local

# A hessian of nothing but negative zeros means "no estimate yet". Equal to zero in every computation and in every
# checkpoint format, and never the result of an estimate: β2 · (−0) + (1 − β2) · 0 is +0 when rounded to nearest.
UNREACHED = -0.0

_STALE_INTERVALS = 10


class Reach:
    """The parameters without curvature, and the warnings that are due because of old or missing curvature."""

    def __init__(self) -> None:
        self._unreached: set[Tensor] = set()
        self._missed: set[Tensor] = set()  # those that the last accepted refresh left out
        self._warned: set[str] = set()

    def __contains__(self, param: Tensor) -> bool:
        return param not in self._unreached

    @property
    def is_complete(self) -> bool:
        """Whether the curvature has reached all parameters."""
        return not self._unreached

    def add(self, params: Iterable[Tensor]) -> None:
        """Parameters that are new to the optimizer."""
        self._unreached.update(params)

    def exempt(self, params: Iterable[Tensor]) -> None:
        """Parameters whose steps need no curvature: they never hold still."""
        freed = set(params)
        self._unreached -= freed
        self._missed -= freed

    def update(self, reached: Iterable[Tensor]) -> None:
        """A refresh was accepted and has reached these."""
        self._unreached.difference_update(reached)
        self._missed = {p for p in self._unreached if p.requires_grad}

    def restore(self, hessians: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Read from (parameter, its loaded hessian or None) which ones were reached before."""
        self._unreached = {p for p, hessian in hessians if hessian is None or _is_unreached(local(hessian))}
        self._missed = set()

    def warn(self, clock: Clock, names: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        """After a step: warn once of parameters that have gradients but hold, and once of curvature that is old."""
        if self._missed and "held" not in self._warned:
            held = [name for name, p in names() if p in self._missed and p.grad is not None]
            if held:
                self._warned.add("held")
                shown = ", ".join(held[:8]) + (f" and {len(held) - 8} more" if len(held) > 8 else "")
                warnings.warn(
                    f"{len(held)} parameters have gradients, but the curvature refresh did not reach them, so they "
                    f"hold still until one does: {shown}. Let the refresh's forward() use them, or give them to "
                    "another optimizer",
                    stacklevel=5,
                )
        if clock.greatest_age > _STALE_INTERVALS * clock.interval and "stale" not in self._warned:
            self._warned.add("stale")
            warnings.warn(
                f"the curvature is {clock.greatest_age} steps old at curvature_interval={clock.interval} "
                f"({clock.refused} refreshes were refused as not finite): call refresh_curvature() at every step",
                stacklevel=5,
            )


def _is_unreached(hessian: Tensor) -> bool:
    # A shard without elements has nothing that could hold still.
    return hessian.numel() > 0 and bool((torch.signbit(hessian) & (hessian == 0)).all())
