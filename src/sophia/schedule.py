"""Learning-rate schedules: pure functions of the step, so that resuming needs no state."""

import math


def warmup_cosine(step: int, *, total_steps: int, warmup_steps: int, final_fraction: float = 0.05) -> float:
    """Factor on the peak learning rate for the update after ``step`` earlier ones.

    It climbs linearly over the first ``warmup_steps`` updates and reaches 1 with the last of them, then falls
    along half a cosine to ``final_fraction``, which the last update (``step = total_steps - 1``) gets exactly.
    Beyond that it stays there. No update gets 0: the first one already moves. (Paper, section 3.1: a cosine
    to 0.05 of the peak.)

    Raises:
        ValueError: A setting is out of its range, or the warm-up leaves no room for the decay.
    """
    if step < 0:
        raise ValueError(f"step is {step}; steps count from 0")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps {warmup_steps} does not fit into total_steps {total_steps}; "
            "it must be at least 0 and below it"
        )
    if not 0.0 <= final_fraction <= 1.0:
        raise ValueError(f"final_fraction is {final_fraction}; it must lie between 0 and 1")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    # The decay starts from the peak: the last warm-up update, or step 0 where there is no warm-up.
    peak = max(warmup_steps - 1, 0)
    span = total_steps - 1 - peak
    progress = min((step - peak) / span, 1.0) if span else 1.0
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))
