"""What every curvature estimator is given, and what it gives back."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from sophia.optim.noise import forked_rng, stream_key
from sophia.optim.replicas import Replicas

Forward: TypeAlias = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """The circumstances of one curvature refresh."""

    seed: int
    """Seed of all noise."""
    step: int
    """t: the optimizer's count of steps so far."""
    scale: float
    """A power of two on the loss that is differentiated, against overflow in fp16."""
    replicas: Replicas
    """The ranks that estimate together."""
    rows: Tensor | None = None
    """Global indices of the batch rows of all forwards in order, int64 [rows]; None counts rows on this rank."""
    autocast: Sequence[tuple[str, torch.dtype, bool]] = ()
    """(device type, dtype, enabled) to run forwards in; empty is the state in which the refresh was called."""

    @contextlib.contextmanager
    def forward_pass(self, index: int, params: Sequence[Tensor], *, full_precision: bool = False) -> Iterator[None]:
        """Gradients on and torch's global generators forked, for running the forward of this index."""
        devices = list({p.device for p in params})
        key = stream_key(self.seed, self.step, self.replicas.rank, index)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(forked_rng(devices, key))
            for kind, dtype, enabled in () if full_precision else self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled))
            for device in devices if full_precision else ():
                stack.enter_context(without_autocast(device))
            yield


class Estimator(Protocol):
    """Estimates the diagonal of a curvature matrix of the mean loss."""

    def estimate(self, forwards: Sequence[Forward], params: Sequence[Tensor], refresh: Refresh) -> list[Tensor | None]:
        """One fp32 tensor a parameter, shaped as its local part, or None where the forwards do not reach it.

        The same on all replicas. `.grad` of every parameter is as it was.
        """
        ...

    def sums(
        self, forwards: Sequence[Forward], params: Sequence[Tensor], refresh: Refresh
    ) -> tuple[list[Tensor | None], float]:
        """The estimate before a last multiplication, and the factor.

        The optimizer multiplies in the pass over memory that folds the estimate in, instead of one more.
        """
        ...


def without_autocast(device: torch.device) -> torch.autocast:
    """Our own arithmetic and backward passes run in the dtypes that their tensors have."""
    return torch.autocast(device.type, enabled=False)
