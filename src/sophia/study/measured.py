"""What an update costs: measured apart from the runs, all optimizers in turn: a busy machine does not decide."""

from dataclasses import dataclass

from sophia.study.runs import Settings


@dataclass(frozen=True, kw_only=True)
class Cost:
    """An optimizer's update, with the curvature or the hook that belongs to it."""

    optimizer: str
    """The entry's name; an ablation's."""
    settings: Settings
    """As they were measured."""
    tokens_per_step: int
    """Predictions in an update."""
    seconds_per_step: float
    """Wall-clock with everything but compilation and evaluation; the median over rounds."""
    ratio: float
    """To the baseline's: the median over rounds, each of which runs all optimizers in turn."""
    ratio_low: float
    """Lower end of the median's 95 % interval, by ranks of the rounds (`statistics.median_interval`)."""
    ratio_high: float
    """Upper end."""
    rounds: int
    """Rounds measured."""
    steps_per_round: int
    """Updates of a round: a multiple of the curvature interval."""
    refreshes_per_round: int | None
    """Curvature estimates made in a round, counted; None where the optimizer has none."""
    flops_per_step: float
    """Floating-point operations of an update on the average: forward, backward, curvature, the optimizer's own matrix
    products."""
    peak_memory_bytes: int | None
    """Highest memory while updates run, beyond what the libraries take; None where the system does not tell."""
    seconds: tuple[float, ...] = ()
    """Of an update, in each round."""
