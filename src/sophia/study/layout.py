"""Where a study runs what: the places of its optimizers and ablations, with their searches as far as they are."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from sophia.study import check
from sophia.study.candidates import Found, changed, rate, rate_of
from sophia.study.runs import FinishedRun, Settings
from sophia.study.search import retune, scan, search
from sophia.study.settings import Ablation, Entry, Study
from sophia.study.slot import Place, Slot


def entry_slots(study: Study, entry: Entry, finished: Mapping[str, FinishedRun]) -> list[Slot]:
    """All places where an entry runs whatever is found: T first, then other budgets, then other batches."""
    race = study.race
    main = _main_slot(study, entry, finished)
    paired = entry.name in (race.baseline, race.headline)
    if not paired:
        return [main]
    budgets = race.baseline_budgets if entry.name == race.baseline else race.headline_budgets
    slots = [main]
    slots += [
        _retuned_slot(study, entry, budget, race.tokens_per_step, main, finished) for budget in budgets if budget != 1.0
    ]
    return slots + [_retuned_slot(study, entry, 1.0, batch, main, finished) for batch in race.other_batches]


def best_batch_slots(
    study: Study, first: Sequence[Slot], batch: int | None, finished: Mapping[str, FinishedRun]
) -> list[Slot]:
    """The baseline's other budgets at its best batch, where that is known and not everybody's.

    Args:
        study: All of it.
        first: The baseline's slots.
        batch: The best; None: not known yet.
        finished: By `RunSpec.id`.
    """
    race = study.race
    if batch is None or batch == race.tokens_per_step:
        return []
    entry = study.entry(race.baseline)
    (centre,) = [slot for slot in first if slot.place.tokens_per_step == batch]
    others = [budget for budget in race.baseline_budgets if budget != 1.0]
    return [_retuned_slot(study, entry, budget, batch, centre, finished) for budget in others]


def _main_slot(study: Study, entry: Entry, finished: Mapping[str, FinishedRun]) -> Slot:
    race = study.race
    place = _place(study, entry, 1.0, race.tokens_per_step, finished, search_budget=race.search_budget)

    def allowed(wanted: Settings) -> bool:
        try:
            check.refuse(entry, race, study.model, dict(wanted), "search")
        except ValueError:
            return False
        return True

    found = _given(changed(entry.settings, lr=entry.lr))
    if race.trials:
        found = search(
            lr=entry.lr,
            others=entry.settings,
            options=entry.search,
            trials=race.trials,
            factor=race.factor,
            loss_of=place.loss,
            allowed=allowed,
        )
    return Slot(place=place, seeds=_seeds(study, entry, 1.0), found=found, expected=race.trials, main=True)


def _retuned_slot(
    study: Study, entry: Entry, budget: float, batch: int, centre: Slot, finished: Mapping[str, FinishedRun]
) -> Slot:
    """A place where only the learning rate is searched anew, around the best of another place."""
    race = study.race
    place = _place(study, entry, budget, batch, finished)
    found: Found | None = None
    if centre.best is not None:
        ratio = batch / centre.place.tokens_per_step
        # The noise of a gradient falls with the root of the batch, and rates of such optimizers rise with it.
        lr = rate(rate_of(centre.best), ratio, Fraction(1, 2))
        around = changed(centre.best, lr=lr)
        found = _given(around)
        if race.retrials:
            found = retune(settings=around, rates=race.retrials, factor=race.factor, loss_of=place.loss)
    return Slot(
        place=place,
        seeds=_seeds(study, entry, budget),
        found=found,
        expected=race.retrials,
        lost=centre.searched and centre.best is None,
    )


def ablation_slot(study: Study, ablation: Ablation, slots: Sequence[Slot], finished: Mapping[str, FinishedRun]) -> Slot:
    """The place of an ablation, at the best settings of its entry among ``slots``."""
    entry = study.entry(ablation.of)
    race = study.race
    place = _place(study, entry, 1.0, race.tokens_per_step, finished, search_budget=race.search_budget)
    (main,) = [slot for slot in slots if slot.main and slot.place.name == entry.name]
    found: Found | None = None
    if main.best is not None:
        wanted = changed(main.best, **dict(ablation.settings))
        if ablation.lr_factors:
            found = scan(settings=wanted, factors=ablation.lr_factors, loss_of=place.loss)
        else:
            found = _given(wanted)
    lost = main.searched and main.best is None
    return Slot(place=place, seeds=race.seeds, found=found, expected=len(ablation.lr_factors), lost=lost)


def _given(settings: Settings) -> Found:
    """No search at all."""
    return Found(candidates=(), done=True, best=settings, edges=())


def _place(
    study: Study,
    entry: Entry,
    budget: float,
    batch: int,
    finished: Mapping[str, FinishedRun],
    search_budget: float | None = None,
) -> Place:
    """A place, whose searches are as long as its runs unless told."""
    race = study.race
    return Place(
        name=entry.name,
        kind=entry.kind,
        steps=race.steps(budget, batch),
        trial_steps=race.steps(search_budget or budget, batch),
        tokens_per_step=batch,
        search_seed=race.search_seed,
        finished=finished,
    )


def _seeds(study: Study, entry: Entry, budget: float) -> tuple[int, ...]:
    race = study.race
    paired = entry.name == race.headline or (entry.name == race.baseline and budget <= 1.0)
    return race.paired_seeds if paired else race.seeds
