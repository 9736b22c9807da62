"""Tables of every trial, every run, and what the search came to."""

from collections.abc import Sequence

from sophia.report import numbers
from sophia.report.markup import Column, Markup, Row, table, tag
from sophia.report.parts import missing, settings
from sophia.report.rates import main_search
from sophia.report.reading import Record, Results, items, number, part, records


def best_settings(results: Results) -> Markup:
    """What each optimizer ran with."""
    if not results.entries:
        return missing("The study has no optimizers.")
    rows = []
    for name, entry in results.entries.items():
        edges = [str(edge) for edge in items(main_search(results, name), "edges")]
        trials = number(entry.get("trials"))
        rows.append(
            (
                tag("span", name, class_="plain"),
                str(entry.get("optimizer") or numbers.MISSING)
                + (f" with {entry['hook']}" if entry.get("hook") else ""),
                settings(part(entry, "best")),
                numbers.MISSING if trials is None else f"{trials:.0f}",
                "; ".join(edges) or "none",
            )
        )
    columns = (
        Column("Optimizer"),
        Column("Kind"),
        Column("Best settings at budget T", wide=True),
        Column("Trials", numeric=True),
        Column("Best on the edge of what was tried"),
    )
    return table(
        "Settings of each optimizer's final runs, found by the same rule.", columns, rows, label="Best settings"
    )


def all_trials(results: Results) -> Markup:
    """Every search of every optimizer, to be opened."""
    boxes = []
    for name, entry in results.entries.items():
        searches = records(entry, "searches")
        tables = [_search(name, search, _where(results, search)) for search in searches if records(search, "trials")]
        count = sum(len(items(search, "trials")) for search in searches)
        content = tables or [missing("No trial has finished yet.")]
        boxes.append(tag("details", tag("summary", tag("strong", name), f": {_counted(count, 'trial')}"), *content))
    for ablation in records(results.record, "ablations"):
        trials = records(ablation, "trials")
        if trials:
            name = f"{ablation.get('of')}: {ablation.get('name')}"
            about = f": {_counted(len(trials), 'trial')} of an ablation"
            inner = _search(name, ablation, "budget T")
            boxes.append(tag("details", tag("summary", tag("strong", name), about), inner))
    return tag("div", *boxes) if boxes else missing("No trial has finished yet.")


def all_runs(results: Results) -> Markup:
    """Every run of the study, to be opened."""
    if not results.runs:
        return missing("No run has finished yet.")
    rows = [
        (
            tag("code", str(run.get("id", numbers.MISSING))),
            str(run.get("optimizer")),
            _role(run),
            numbers.budget(run.get("tokens"), results.tokens),
            numbers.count(run.get("tokens_per_step")),
            numbers.count(run.get("steps")),
            str(run.get("seed", numbers.MISSING)),
            settings(part(run, "settings")),
            _loss(run.get("val_loss")),
            numbers.seconds(run.get("seconds")),
            numbers.seconds(run.get("seconds_as_run")),
            numbers.operations(run.get("flops")),
        )
        for run in results.runs
    ]
    columns = (
        Column("Run"),
        Column("Optimizer"),
        Column("Role"),
        Column("Budget"),
        Column("Tokens a step", numeric=True),
        Column("Steps", numeric=True),
        Column("Seed", numeric=True),
        Column("Settings", wide=True),
        Column("Final loss", numeric=True),
        Column("Time, as timed", numeric=True),
        Column("Time, as it ran", numeric=True),
        Column("Operations", numeric=True),
    )
    caption = (
        "Every finished run. Comparisons use the time that follows from steps timed in turn, not the time as it ran."
    )
    inner = table(caption, columns, rows, label="All runs")
    return tag("details", tag("summary", tag("strong", "All runs"), f": {len(rows)}"), inner, id="runs")


def _where(results: Results, search: Record) -> str:
    budget, batch = numbers.budget(search.get("tokens"), results.tokens), numbers.count(search.get("tokens_per_step"))
    return f"budget {budget}, {batch} tokens a step"


def _search(name: str, search: Record, where: str) -> Markup:
    trials = records(search, "trials")
    finite = [loss for trial in trials if (loss := number(trial.get("loss"))) is not None]
    best = min(finite, default=None)
    varied = _varied(trials)
    rows = []
    for place, trial in enumerate(trials, start=1):
        chosen, loss = part(trial, "settings"), number(trial.get("loss"))
        is_best = loss is not None and loss == best
        cells = [numbers.setting(key, chosen[key]) if key in chosen else numbers.MISSING for key in varied]
        rows.append(
            Row(
                (
                    str(place),
                    str(trial.get("why", numbers.MISSING)),
                    *cells,
                    _loss(loss) + (" (best)" if is_best else ""),
                    tag("code", str(trial.get("id", numbers.MISSING))),
                ),
                strong=is_best,
            )
        )
    fixed = {key: value for key, value in part(trials[0], "settings").items() if key not in varied}
    columns = (
        Column("Trial"),
        Column("Asked for by"),
        *(Column(key, numeric=True) for key in varied),
        Column("Loss", numeric=True),
        Column("Run"),
    )
    caption = f"{name}, {where}." + (f" In all trials: {settings(fixed)}." if fixed else "")
    edges = "".join(f" Edge: {edge}." for edge in items(search, "edges"))
    return table(caption + edges, columns, rows, label=f"Trials of {name}, {where}")


def _varied(trials: Sequence[Record]) -> list[str]:
    """Settings that are not the same in all trials, and the learning rate."""
    keys: dict[str, set[str]] = {}
    for trial in trials:
        for key, value in part(trial, "settings").items():
            keys.setdefault(str(key), set()).add(repr(value))
    changed = [
        key
        for key, values in keys.items()
        if len(values) > 1 or sum(key in part(trial, "settings") for trial in trials) < len(trials)
    ]
    return ["lr", *sorted(key for key in changed if key != "lr")]


def _role(run: Record) -> str:
    role, ablation = str(run.get("role", numbers.MISSING)), run.get("ablation")
    return (
        role if ablation is None else f"{role}: {ablation}" if role == "ablation" else f"{role}, ablation: {ablation}"
    )


def _loss(value: object) -> str:
    return numbers.loss(value) if number(value) is not None else "diverged"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
