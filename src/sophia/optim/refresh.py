"""One curvature refresh: what the user handed over, agreed upon by all ranks and given to the estimator."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.optim import checks, fsdp
from sophia.optim.clock import Clock
from sophia.optim.curvature import Estimator, Forward, Refresh
from sophia.optim.dtensor import local
from sophia.optim.replicas import Replicas


def estimate(
    estimator: Estimator,
    forward: Any,
    params: Sequence[Tensor],
    *,
    rows: Tensor | Sequence[int] | None,
    clock: Clock,
    replicas: Replicas,
    autocast: Sequence[tuple[str, torch.dtype, bool]] = (),
) -> tuple[list[Tensor | None], float]:
    """The estimator's sums, one local tensor or None a parameter, and the factor that makes them the estimate.

    Raises:
        ValueError: as of :func:`prepare`.
    """
    forwards, refresh = prepare(forward, params, rows=rows, clock=clock, replicas=replicas, autocast=autocast)
    with fsdp.gathered_anew():
        return estimator.sums(forwards, params, refresh)


def prepare(
    forward: Any,
    params: Sequence[Tensor],
    *,
    rows: Tensor | Sequence[int] | None,
    clock: Clock,
    replicas: Replicas,
    autocast: Sequence[tuple[str, torch.dtype, bool]] = (),
) -> tuple[list[Forward], Refresh]:
    """What an estimator is given: the forwards, and the circumstances.

    Raises:
        ValueError: forward or rows are not what they must be, or the ranks came with different numbers of forwards.
    """
    forwards: list[Forward] = []
    numbers, error = None, None
    try:
        forwards = checks.checked_forwards(forward)
        numbers = checks.checked_rows(rows)
    except ValueError as problem:
        error = problem
    counts = replicas.agree(error, [len(forwards)], local(params[0]).device)
    if len({count for (count,) in counts}) > 1:
        raise ValueError(
            f"the ranks came with {[count for (count,) in counts]} forwards: each rank needs the same number, "
            "if need be with a mask that counts nothing"
        )
    return forwards, Refresh(
        seed=clock.seed, step=clock.time, scale=clock.scale, replicas=replicas, rows=numbers, autocast=autocast
    )
