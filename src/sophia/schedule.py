"""Learning-rate schedules: pure functions of the step, so that resuming needs no state."""

import math
from collections.abc import Callable
from typing import Literal, get_args

ScheduleKind = Literal["cosine", "linear", "wsd", "constant"]

# How much of the way to the end is left, from 1 down to 0, as the fall progresses from 0 to 1.
_FALLS: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "wsd": lambda progress: 1.0 - math.sqrt(progress),
}


def lr_factor(
    kind: ScheduleKind,
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    final_fraction: float = 0.05,
    decay_fraction: float = 0.2,
) -> float:
    """Factor on the peak learning rate for the update after ``step`` earlier ones.

    It climbs linearly over the first ``warmup_steps`` updates and reaches 1 with the last of them, then falls to
    ``final_fraction``, which the last update (``step = total_steps - 1``) gets exactly. Beyond that it stays there. No
    update gets 0: the first one already moves.

    Args:
        kind: The shape of the fall.
            "cosine": half a cosine, as the Sophia paper trains (section 3.1).
            "linear": a straight line.
            "wsd" (warm-up, stable, decay; Hu et al. 2024, "MiniCPM"): stays at the peak and falls in the last
            ``decay_fraction`` of all steps, so that a run can be prolonged from before its fall. It falls as 1 - sqrt,
            which ends lower than a straight line, and a fifth of the run is enough for it to reach the cosine (Hägele
            et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations").
            "constant": no fall at all.
        step: Updates done, from 0.
        total_steps: Updates of the run.
        warmup_steps: Updates that climb; at least 0 and below ``total_steps``.
        final_fraction: The last factor; "constant" does not read it.
        decay_fraction: Share of all updates in which "wsd" falls; the others do not read it.

    Raises:
        ValueError: A setting is out of its range, or the warm-up leaves no room for the decay.
    """
    if kind not in get_args(ScheduleKind):
        raise ValueError(f"schedule is {kind!r}; it must be one of {', '.join(get_args(ScheduleKind))}")
    if step < 0:
        raise ValueError(f"step is {step}; steps count from 0")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps {warmup_steps} does not fit into total_steps {total_steps}; "
            "it must be at least 0 and below it"
        )
    if not 0.0 <= final_fraction <= 1.0:
        raise ValueError(f"final_fraction is {final_fraction}; it must lie between 0 and 1")
    # The fall starts from the peak: the last warm-up update, or step 0 where there is no warm-up.
    peak = max(warmup_steps - 1, 0)
    if kind == "wsd":
        peak = max(peak, total_steps - 1 - _decay_steps(total_steps, warmup_steps, decay_fraction))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant" or step <= peak < total_steps - 1:
        return 1.0
    span = total_steps - 1 - peak
    progress = min((step - peak) / span, 1.0) if span else 1.0
    return final_fraction + (1.0 - final_fraction) * _FALLS[kind](progress)


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int, final_fraction: float = 0.05) -> float:
    """``lr_factor`` of the cosine."""
    return lr_factor("cosine", step, total_steps=total_steps, warmup_steps=warmup_steps, final_fraction=final_fraction)


def _decay_steps(total_steps: int, warmup_steps: int, decay_fraction: float) -> int:
    if not 0.0 < decay_fraction <= 1.0:
        raise ValueError(
            f"decay_fraction is {decay_fraction}; it must be above 0 and at most 1 (constant never decays)"
        )
    decay_steps = max(1, round(decay_fraction * total_steps))
    if warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"warmup_steps {warmup_steps} and a decay of {decay_steps} steps (decay_fraction {decay_fraction}) do not "
            f"fit into total_steps {total_steps}; lower one of them"
        )
    return decay_steps
