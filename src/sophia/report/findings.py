"""Tables of what was found."""

from sophia.report import numbers
from sophia.report.markup import Column, Markup, Row, join, table, tag
from sophia.report.parts import differences, losses, missing, settings, speedups
from sophia.report.reading import Estimate, Record, Results, claimed, estimate, number, part, records


def race(results: Results) -> Markup:
    """All optimizers at equal batch, by their loss."""
    if not results.entries:
        return missing("The study has no optimizers.")
    rows = []
    for name in results.ranked:
        entry = results.entries[name]
        loss = estimate(entry, "final_loss")
        rows.append(
            Row(
                (
                    _role(results, name),
                    losses(loss) if loss else _no_loss(results, name),
                    _seeds(results, name, loss),
                    *(speedups(estimate(entry, f"speedup_{key}")) for key in ("tokens", "seconds", "flops")),
                    tag("span", _claim(results, name, entry), class_="plain"),
                ),
                strong=name == results.headline,
            )
        )
    columns = (
        Column("Optimizer"),
        Column("Final loss", numeric=True),
        Column("Seeds", numeric=True),
        Column("Speed-up in tokens", numeric=True),
        Column("in time", numeric=True),
        Column("in operations", numeric=True),
        Column("Claim"),
    )
    caption = (
        f"All optimizers at budget T and equal batch, lowest loss first, in nats a token. Speed-up: how many times T "
        f"{results.baseline or 'the baseline'} needs for the same loss. In parentheses "
        "95 % intervals over seeds. The claim is what the intervals in tokens and in time allow to say."
    )
    return table(caption, columns, rows, label="Final losses and speed-ups")


def duels(results: Results) -> Markup | None:
    """The optimizer under test against each of the others."""
    rows = []
    for found in records(results.record, "duels"):
        name = str(found.get("optimizer"))
        if estimate(found, "speedup_tokens") is not None:
            rows.append(
                (
                    tag("span", name, class_="plain"),
                    *(speedups(estimate(found, f"speedup_{key}")) for key in ("tokens", "seconds", "flops")),
                    tag("span", _claim(results, name, found), class_="plain"),
                )
            )
    if not rows:
        return None
    columns = (
        Column(f"{results.headline} against"),
        Column("Ahead in tokens", numeric=True),
        Column("in time", numeric=True),
        Column("in operations", numeric=True),
        Column("Claim"),
    )
    caption = (
        f"How many times the speed-up of each other optimizer that of {results.headline} is: seed by seed, and in time "
        f"round by round, so that the uncertainty of {results.baseline}'s curve, which both share, drops out."
    )
    return table(caption, columns, rows, label=f"{results.headline} against the others")


def baseline_budgets(results: Results) -> Markup | None:
    """The baseline's own runs."""
    points = sorted(
        records(results.record, "baseline_curve"),
        key=lambda point: (
            number(point.get("tokens_per_step")) != results.tokens_per_step,  # the common batch first
            number(point.get("tokens_per_step")) or 0,
            number(point.get("tokens")) or 0,
        ),
    )
    if not points:
        return None
    rows = [
        (
            numbers.budget(point.get("tokens"), results.tokens),
            numbers.count(point.get("tokens")),
            numbers.count(point.get("tokens_per_step")),
            numbers.count(point.get("steps")),
            numbers.rate(point.get("lr")),
            losses(estimate(point, "loss")),
        )
        for point in points
    ]
    columns = (
        Column("Budget"),
        Column("Tokens", numeric=True),
        Column("Tokens a step", numeric=True),
        Column("Steps", numeric=True),
        Column("Best learning rate", numeric=True),
        Column("Final loss", numeric=True),
    )
    caption = f"{results.baseline}'s L(D): each budget has runs with a whole schedule and a search of its own."
    return table(caption, columns, rows, label="The baseline's budgets")


def paper_test(results: Results) -> Markup:
    """The paper's own claim: as good with a part of the budget."""
    rows = []
    for name, entry in results.entries.items():
        test = part(entry, "paper_test")
        if not test:
            continue
        found = estimate(test, "difference")
        rows.append(
            (
                tag("span", name, class_="plain"),
                numbers.budget(test.get("tokens"), results.tokens),
                losses(estimate(test, "loss")),
                differences(found),
                _better(found, yes="passed: lower loss", no="failed: higher loss"),
            )
        )
    if not rows:
        return missing("The optimizer under test has no final runs at a smaller budget.")
    columns = (
        Column("Optimizer"),
        Column("Its budget"),
        Column("Final loss", numeric=True),
        Column(f"Difference from {results.baseline} at T", numeric=True),
        Column("Outcome"),
    )
    caption = (
        f"Sophia's paper claims {results.baseline}'s loss in half the steps: here with a part of the budget, against "
        f"{results.baseline} with all of it, seed by seed."
    )
    return table(caption, columns, rows, label="The paper's own test")


def best_batch(results: Results) -> Markup:
    """Each at the batch that suits it."""
    rows = []
    for name, entry in results.entries.items():
        found = part(entry, "best_batch")
        if found:
            rows.append(
                (
                    tag("span", name, class_="plain"),
                    numbers.count(found.get("tokens_per_step")),
                    settings(part(found, "best")),
                    losses(estimate(found, "final_loss")),
                    speedups(estimate(found, "speedup_tokens")),
                    speedups(estimate(found, "speedup_seconds")),
                )
            )
    if not rows:
        return missing("No other batch was tried, or its final runs are missing.")
    columns = (
        Column("Optimizer"),
        Column("Best tokens a step", numeric=True),
        Column("Settings", wide=True),
        Column("Final loss", numeric=True),
        Column("Speed-up in tokens", numeric=True),
        Column("in time", numeric=True),
    )
    return table("Each optimizer at the batch that suits it best, at budget T.", columns, rows, label="Best batches")


def ablations(results: Results) -> Markup:
    """Changes in the study's order, each with a word on what it did."""
    rows = []
    for ablation in records(results.record, "ablations"):
        found, loss = estimate(ablation, "difference"), estimate(ablation, "final_loss")
        word = _better(found, yes="▼ better", no="▲ worse")
        rows.append(
            (
                str(ablation.get("name")),
                tag("span", word, class_="plain"),
                differences(found),
                numbers.loss(None if loss is None else loss.value),
                settings(part(ablation, "settings")),
                numbers.rate(part(ablation, "best").get("lr")) + (" (searched)" if ablation.get("searched") else ""),
                tag("span", ablation.get("of"), class_="plain"),
            )
        )
    if not rows:
        return missing("The study has no ablations, or none has begun.")
    columns = (
        Column("Change", wide=True),
        Column("Effect"),
        Column("Difference", numeric=True),
        Column("Final loss", numeric=True),
        Column("Settings changed", wide=True),
        Column("Learning rate", numeric=True),
        Column("Of"),
    )
    caption = (
        "One thing changed at a time, at the entry's best settings otherwise. Differences are in pairs of equal seed; "
        "below 0 the change lowers the loss."
    )
    return table(caption, columns, rows, label="Ablations")


def _role(results: Results, name: str) -> object:
    role = {results.baseline: " (baseline)", results.headline: " (under test)"}.get(name, "")
    kind = results.entries[name].get("optimizer")
    about = f" {kind}" if kind and kind != name else ""
    return join([tag("span", name, class_="plain"), tag("span", (about + role).strip(), class_="range")], " ")


def _seeds(results: Results, name: str, loss: Estimate | None) -> str:
    diverged = _diverged(results, name)
    count = numbers.MISSING if loss is None or loss.n is None else str(loss.n)
    return f"{count} ({diverged} diverged)" if diverged and loss else count


def _diverged(results: Results, name: str) -> int:
    return sum(number(run.get("val_loss")) is None for run in results.finals(name))


def _no_loss(results: Results, name: str) -> str:
    return "diverged" if results.record.get("complete") is True or _diverged(results, name) else "not yet"


def _claim(results: Results, name: str, entry: Record) -> str:
    """In words, what the intervals allow to say."""
    if name == results.baseline or estimate(entry, "speedup_tokens") is None:
        return numbers.MISSING
    said: dict[str, list[str]] = {}
    for key, what in (("speedup_tokens", "tokens"), ("speedup_seconds", "time")):
        found = estimate(entry, key)
        if found is not None and claimed(entry, key, found):
            said.setdefault("faster" if found.value > 1 else "slower", []).append(what)
    return ", ".join(f"{word} in {'both' if len(where) == 2 else where[0]}" for word, where in said.items()) or "none"


def _better(found: Estimate | None, *, yes: str, no: str) -> str:
    """What a difference of losses says, if it says anything."""
    if found is None:
        return numbers.MISSING
    if not found.excludes(0.0):
        return "no clear difference"
    return yes if found.value < 0 else no
