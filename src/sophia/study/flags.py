"""What a reader of the results must know before believing them, a sentence each."""

from collections.abc import Sequence

from sophia.study.curve import mean_curve
from sophia.study.evidence import plain
from sophia.study.plan import Cell, roles
from sophia.study.standing import Standing, Standings

_ENOUGH_SEEDS = 6
_ENOUGH_TRIALS = 5
_ENOUGH_ROUNDS = 6
_NOISY = 0.2


def flags(table: Standings, committed: bool | None) -> list[str]:
    """All that can be told from the state of a study."""
    return [
        *_file(table, committed),
        *_searches(table),
        *_edges(table),
        *_diverged(table),
        *_seeds(table),
        *_curve(table),
        *_bounds(table),
        *_batches(table),
        *_ablations(table),
        *_timing(table),
        *_unseen_costs(table),
        *_unused(table),
    ]


def amount(tokens: float) -> str:
    """Tokens as a person reads them."""
    for unit, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.4g} {unit}"
    return f"{tokens:.4g}"


def _numbered(noun: str, numbers: Sequence[int]) -> str:
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _file(table: Standings, committed: bool | None) -> list[str]:
    baseline = table.study.race.baseline
    under_test = any(run.spec.optimizer != baseline for run in table.finished.values())
    if committed or not under_test:
        return []
    if committed is None:
        return [
            "whether the study file was settled before the first run under test cannot be told: it is in no git "
            "repository"
        ]
    return ["the study file was not committed, or changed since, when the first run under test started"]


def _searches(table: Standings) -> list[str]:
    race, told = table.study.race, []
    if not race.trials:
        return [
            "untuned: no optimizer was searched, all ran as the study file has them; the order of their losses may be "
            "that of its guesses"
        ]
    rates_only = [entry.name for entry in table.study.optimizers if not entry.search]
    if rates_only:
        told.append(f"searched over the learning rate alone, other settings as given: {', '.join(rates_only)}")
    if race.search_budget != 1.0:
        told.append(
            f"searched at {race.search_budget:g} of the budget: what is best for longer runs may be something else"
        )
    if race.trials < _ENOUGH_TRIALS:
        told.append(
            f"every optimizer had {race.trials} trials: a grid of learning rates a factor of {race.factor:g} apart, "
            "hardly refined"
        )
    counts: dict[str, int] = {}
    for entry in table.study.optimizers:
        cell = table.cell(entry.name)
        if cell is not None and cell.finals:
            counts[entry.name] = sum(trial.finished for trial in cell.trials)
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{name} {count}" for name, count in counts.items())
        told.append(f"the searches had different numbers of trials: {each}")
    return told


def _edges(table: Standings) -> list[str]:
    told = [f"{_place(cell)}: {edge}" for cell in table.plan.cells for edge in cell.edges]
    told += [f"ablation {one.name}: {edge}" for one in table.plan.ablations for edge in one.edges]
    return told


def _place(cell: Cell) -> str:
    return f"{cell.optimizer} at {amount(cell.steps * cell.tokens_per_step)} tokens, {cell.tokens_per_step} a step"


def _diverged(table: Standings) -> list[str]:
    told = []
    for cell in table.plan.cells:
        lost = [spec for spec in cell.finals if spec.id in table.finished and table.finished[spec.id].val_loss is None]
        if lost:
            told.append(
                f"{_place(cell)}: {len(lost)} of {len(cell.finals)} final runs diverged "
                f"({_numbered('seed', [spec.seed for spec in lost])})"
                + ("; the baseline's curve leaves them out" if cell.optimizer == table.study.race.baseline else "")
            )
        found = [plain(trial.spec.settings) for trial in cell.trials if trial.finished and trial.loss is None]
        if found and len(found) < len(cell.trials):  # or it is told as an edge
            told.append(f"{_place(cell)}: {len(found)} of {len(cell.trials)} trials diverged: {'; '.join(found)}")
    for one in table.plan.ablations:
        lost = [spec for spec in one.finals if spec.id in table.finished and table.finished[spec.id].val_loss is None]
        if lost:
            told.append(f"ablation {one.name}: {len(lost)} of {len(one.finals)} final runs diverged")
    return told


def _seeds(table: Standings) -> list[str]:
    race = table.study.race
    if not race.headline:
        return []
    wanted = len(race.paired_seeds)
    if wanted >= _ENOUGH_SEEDS:
        return []
    return [
        f"the headline pair has {wanted} seed{'s' if wanted > 1 else ''}, fewer than {_ENOUGH_SEEDS}: a small saving "
        "cannot be told from none"
    ]


def _curve(table: Standings) -> list[str]:
    race, told = table.study.race, []
    sizes = dict.fromkeys(c.tokens_per_step for c in table.plan.cells if c.optimizer == race.baseline)
    for size in sizes:
        curve = mean_curve(table.baseline(size), race.tokens)
        told += [
            f"{race.baseline}'s loss does not fall from {amount(smaller)} to {amount(larger)} tokens at {size} a step: "
            "the least budget that reaches a loss counts, and its learning rates there deserve more trials"
            for smaller, larger in (curve.rises() if curve is not None else ())
        ]
    for entry in table.study.optimizers:
        shifted = table.standing(table.cell(entry.name), table.cell(race.baseline)).shifted
        if shifted:
            told.append(
                f"{entry.name}: {race.baseline} has not run at all of its budgets with {_numbered('seed', shifted)}; "
                "there its mean curve counts, shifted by the seed's difference at T"
            )
    return told


def _bounds(table: Standings) -> list[str]:
    race, reference = table.study.race, table.cell(table.study.race.baseline)
    told = []
    for entry in table.study.optimizers:
        told += _beyond(entry.name, race.baseline, table.standing(table.cell(entry.name), reference))
    if race.headline and race.other_batches:
        standing = table.standing(table.best_batch(race.headline), table.best_batch(race.baseline))
        told += _beyond(f"{race.headline} at its best batch", race.baseline, standing)
    return told


def _beyond(who: str, baseline: str, standing: Standing) -> list[str]:
    if standing.both_sides:
        return [
            f"{who}: losses lie on both sides of what {baseline} was run at, so there is no speed-up: give it more "
            "budgets"
        ]
    if standing.tokens is None or standing.tokens.bound is None:
        return []
    where = "below" if standing.tokens.bound == "at least" else "above"
    return [
        f"{who}: a loss lies {where} all that {baseline} was run at, so its speed-up is {standing.tokens.bound} "
        f"{standing.tokens.value:.3g}, without an interval"
    ]


def _batches(table: Standings) -> list[str]:
    race = table.study.race
    if not race.headline:
        return []
    if not race.other_batches:
        return [f"all ran at {race.tokens_per_step} tokens a step: there is no row with each at its best batch"]
    sizes = sorted(race.batches)
    told = []
    for name in (race.baseline, race.headline):
        cell = table.best_batch(name)
        if cell is not None and cell.tokens_per_step in (sizes[0], sizes[-1]):
            told.append(f"{name}: the best batch, {cell.tokens_per_step} tokens a step, is on the edge of those tried")
    return told


def _ablations(table: Standings) -> list[str]:
    untuned = [one.name for one in table.study.ablations if not one.lr_factors]
    return [f"ablations that keep the learning rate of their entry: {', '.join(untuned)}"] if untuned else []


def _timing(table: Standings) -> list[str]:
    noisy, few = [], set()
    common = table.study.race.tokens_per_step
    for cost in table.costs:
        if (cost.ratio_high - cost.ratio_low) / cost.ratio > _NOISY:
            batch = "" if cost.tokens_per_step == common else f" at {cost.tokens_per_step} tokens"
            noisy.append(f"{cost.optimizer}{batch} {cost.ratio_low:.2f} to {cost.ratio_high:.2f}")
        if cost.rounds < _ENOUGH_ROUNDS:
            few.add(cost.rounds)
    told = []
    if noisy:
        told.append(f"the machine was busy: a step's time beside the baseline's is known poorly: {', '.join(noisy)}")
    if few:
        told.append(
            f"times come from {min(few)} rounds, fewer than {_ENOUGH_ROUNDS}: their range is no 95 % interval of the "
            "median"
        )
    return told


def _unseen_costs(table: Standings) -> list[str]:
    """Of optimizers that nobody knows from inside: a median over rounds leaves out what only some of them hold."""
    told = []
    for entry in table.study.optimizers:
        cost = table.cost(entry.name, table.study.race.tokens_per_step)
        if ":" in entry.kind and cost is not None:
            told.append(
                f"{entry.name}: timed in rounds of {cost.steps_per_round} steps; what {entry.kind} does less often may "
                "be missing in its time and its operations"
            )
    return told


def _unused(table: Standings) -> list[str]:
    known = roles(table.plan)
    counts: dict[str, int] = {}
    for run in table.finished.values():
        if run.spec.id not in known:
            counts[run.spec.optimizer] = counts.get(run.spec.optimizer, 0) + 1
    if not counts:
        return []
    each = ", ".join(f"{name} {count}" for name, count in counts.items())
    return [f"runs that an earlier form of the study asked for, listed as other: {each}"]
