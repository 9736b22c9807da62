"""Where each optimizer stands: losses over seeds and speed-ups, put together from the plan's cells and their runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from sophia.study.curve import Losses
from sophia.study.evidence import same_cost
from sophia.study.measured import Cost
from sophia.study.plan import AblationCell, Cell, Plan, best_batch
from sophia.study.runs import FinishedRun, Settings
from sophia.study.settings import Study
from sophia.study.speedup import Speedup, over, speedup
from sophia.study.statistics import Estimate, difference, divided, mean, median_interval


@dataclass(frozen=True, kw_only=True)
class Standing:
    """An optimizer against the baseline, each at the batch of its own cell."""

    tokens: Estimate | None
    """Speed-up in tokens."""
    seconds: Estimate | None
    """In time."""
    flops: Estimate | None
    """In operations."""
    claim: bool
    """Whether a difference in tokens may be claimed."""
    claim_seconds: bool
    """Whether one in time may be."""
    shifted: tuple[int, ...] = ()
    """Seeds whose curve of the baseline is partly that of others."""
    both_sides: bool = False
    """Whether some seeds lie above and some below what the baseline was run at, so that there is no number."""


class Standings:
    """Answers about one state of a study."""

    def __init__(self, study: Study, plan: Plan, finished: Mapping[str, FinishedRun], costs: Sequence[Cost]) -> None:
        self.study, self.plan, self.finished, self.costs = study, plan, finished, costs

    def cell(self, name: str, tokens: int | None = None, tokens_per_step: int | None = None) -> Cell | None:
        """The cell of an entry at a budget and a batch; None stands for the study's."""
        race = self.study.race
        at = (name, tokens or race.tokens, tokens_per_step or race.tokens_per_step)
        cells = self.plan.cells
        return next((c for c in cells if (c.optimizer, c.steps * c.tokens_per_step, c.tokens_per_step) == at), None)

    def losses(self, cell: Cell | AblationCell | None) -> dict[int, float]:
        """Final loss by seed of the runs that have ended; infinite for one that diverged."""
        specs = () if cell is None else cell.finals
        return {spec.seed: self.finished[spec.id].score for spec in specs if spec.id in self.finished}

    def baseline(self, tokens_per_step: int) -> Losses:
        """The baseline's L(D) at a batch size: finite losses by budget and seed."""
        cells = [
            c
            for c in self.plan.cells
            if c.optimizer == self.study.race.baseline and c.tokens_per_step == tokens_per_step
        ]
        return {cell.steps * cell.tokens_per_step: _finite(self.losses(cell)) for cell in cells}

    def cost(self, name: str, tokens_per_step: int) -> Cost | None:
        """What an update of an entry costs; of an ablation that costs something else than its entry."""
        return next((c for c in self.costs if (c.optimizer, c.tokens_per_step) == (name, tokens_per_step)), None)

    def cost_with(self, settings: Settings, *names: str, tokens_per_step: int) -> Cost | None:
        """The cost of the first of these names that was timed with settings of equal cost."""
        found = [self.cost(name, tokens_per_step) for name in names]
        return next((cost for cost in found if cost is not None and same_cost(cost.settings, settings)), None)

    def best_batch(self, name: str) -> Cell | None:
        """The cell of the batch size with the lowest loss at T; None before all have run."""
        size = best_batch(self.study, self.plan.cells, self.finished, name)
        return None if size is None else self.cell(name, tokens_per_step=size)

    def missing(self) -> str:
        """What a verdict on the headline entry still waits for; empty where nothing is."""
        race = self.study.race
        for name in (race.baseline, race.headline):
            cell = self.cell(name)
            done = 0 if cell is None else sum(trial.finished for trial in cell.trials)
            if cell is None or done < race.trials:
                return f"the search of {name} has {done} of {race.trials} runs"
            if cell.best is None:
                return f"in the search of {name} every run diverged"
        cells = [
            cell
            for cell in self.plan.cells
            if cell.optimizer in (race.baseline, race.headline) and cell.tokens_per_step == race.tokens_per_step
        ]
        if any(not trial.finished for cell in cells for trial in cell.trials):
            return "searches at other budgets go on"
        wanted = [spec.id for cell in cells for spec in cell.finals]
        done = sum(one in self.finished for one in wanted)
        if done < len(wanted):
            return f"{done} of {len(wanted)} final runs of the two are done"
        for name in (race.baseline, race.headline):
            if self.cost(name, race.tokens_per_step) is None:
                return f"updates of {name} have not been timed"
        return ""

    def standing(self, cell: Cell | None, reference: Cell | None) -> Standing:
        """An entry's cell at T against the baseline's curve at the batch of its own cell."""
        if cell is None or reference is None:
            return Standing(tokens=None, seconds=None, flops=None, claim=False, claim_seconds=False)
        if cell.optimizer == self.study.race.baseline:
            n = len(self.losses(cell))
            exact = Estimate(value=1.0, low=1.0, high=1.0, n=n) if n else None
            return Standing(tokens=exact, seconds=exact, flops=exact, claim=False, claim_seconds=False)
        found = speedup(self.losses(cell), self.study.race.tokens, self.baseline(reference.tokens_per_step))
        time, operations = self._ratios(cell, reference)
        seconds = None if found.tokens is None or time is None else divided(found.tokens, time)
        flops = None if found.tokens is None or operations is None else divided(found.tokens, operations)
        return Standing(
            tokens=found.tokens,
            seconds=seconds,
            flops=flops,
            claim=found.claim and self.study.race.trials > 0,  # untuned, nothing is claimed
            claim_seconds=_claims_time(found, time, seconds) and self.study.race.trials > 0,
            shifted=found.shifted,
            both_sides=found.tokens is None and bool(found.seeds),
        )

    def duel(self, cell: Cell | None, other: Cell | None) -> Standing:
        """The ratio of two entries' speed-ups at T and at equal batch: how much the first is ahead of the other.

        Seed by seed and round by round, so that what both owe to the baseline's luck drops out.
        """
        if cell is None or other is None:
            return Standing(tokens=None, seconds=None, flops=None, claim=False, claim_seconds=False)
        size = cell.tokens_per_step
        tokens = over(self.losses(cell), self.losses(other), self.study.race.tokens, self.baseline(size))
        ours, theirs = (self.cost(one.optimizer, size) for one in (cell, other))
        if tokens is None or ours is None or theirs is None or not len(ours.seconds) == len(theirs.seconds) > 0:
            time = operations = None
        else:
            ratios = [own / another for own, another in zip(ours.seconds, theirs.seconds, strict=True)]
            low, high = median_interval(ratios)
            time = divided(tokens, Estimate(value=median(ratios), low=low, high=high, n=len(ratios)))
            exact = ours.flops_per_step / theirs.flops_per_step
            operations = divided(tokens, Estimate(value=exact, low=exact, high=exact, n=1))
        tuned = self.study.race.trials > 0
        return Standing(
            tokens=tokens,
            seconds=time,
            flops=operations,
            claim=tuned and tokens is not None and not tokens.holds(1.0),
            claim_seconds=tuned and time is not None and not time.holds(1.0),
        )

    def _ratios(self, cell: Cell, reference: Cell) -> tuple[Estimate | None, Estimate | None]:
        """What a token costs in seconds and in operations, relative to the baseline's."""
        ours = self.cost(cell.optimizer, cell.tokens_per_step)
        theirs = self.cost(self.study.race.baseline, reference.tokens_per_step)
        if ours is None or theirs is None:
            return None, None
        operations = (ours.flops_per_step / ours.tokens_per_step) / (theirs.flops_per_step / theirs.tokens_per_step)
        value = ours.ratio
        if ours.tokens_per_step != theirs.tokens_per_step:  # no round has run both: the medians' ratio
            value = (ours.seconds_per_step / ours.tokens_per_step) / (theirs.seconds_per_step / theirs.tokens_per_step)
        time = Estimate(
            value=value,
            low=value * ours.ratio_low / ours.ratio,
            high=value * ours.ratio_high / ours.ratio,
            n=ours.rounds,
        )
        return time, Estimate(value=operations, low=operations, high=operations, n=1)


def final_loss(losses: Mapping[int, float]) -> Estimate | None:
    """The mean over seeds; None where a run diverged: the others alone would flatter."""
    return None if any(map(math.isinf, losses.values())) else mean([losses[seed] for seed in sorted(losses)])


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """The mean difference over common seeds; None where one of their runs diverged."""
    common = ours.keys() & theirs.keys()
    if any(math.isinf(losses[seed]) for losses in (ours, theirs) for seed in common):
        return None
    return difference(ours, theirs)


def _finite(losses: Mapping[int, float]) -> dict[int, float]:
    return {seed: loss for seed, loss in losses.items() if math.isfinite(loss)}


def _claims_time(found: Speedup, time: Estimate | None, seconds: Estimate | None) -> bool:
    if found.tokens is None or time is None or seconds is None or time.low is None or time.high is None:
        return False
    if found.tokens.bound is None:
        return not seconds.holds(1.0)
    # A bound in tokens, at the least favourable price of a token.
    if found.tokens.bound == "at least":
        return found.claim and found.tokens.value / time.high > 1.0
    return found.claim and found.tokens.value / time.low < 1.0
