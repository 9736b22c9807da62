"""The head of the report: the verdict, what it rests on, and what weakens it."""

from sophia.report import numbers
from sophia.report.markup import Markup, join, tag
from sophia.report.reading import Estimate, Results, estimate, items, number, part


def head(results: Results) -> Markup:
    """Title, verdict, key numbers, conditions."""
    study = results.study
    verdict = str(results.record.get("verdict") or "No verdict yet.")
    unfinished = None
    if results.record.get("complete") is not True:
        unfinished = tag(
            "p",
            tag("strong", "Unfinished."),
            " Runs of this study are missing, and what follows may change.",
            class_="note",
        )
    return tag(
        "header",
        tag("h1", study.get("name") or "A study of optimizers"),
        tag("p", study["about"], class_="note") if study.get("about") else None,
        tag("p", verdict, class_="verdict"),
        unfinished,
        _key_numbers(results),
        tag("p", _conditions(results), class_="note"),
    )


def flags(results: Results) -> Markup:
    """What weakens the verdict, in the judge's words."""
    found = [str(flag) for flag in items(results.record, "flags")]
    if not found:
        so_far = "" if results.record.get("complete") is True else " so far"
        return tag("p", f"Nothing that weakens these results was found{so_far}.", class_="note", id="flags")
    title = "What weakens these results"
    return tag("aside", tag("h2", title), tag("ul", *(tag("li", flag) for flag in found)), class_="flags", id="flags")


def _key_numbers(results: Results) -> Markup | None:
    shown: list[Markup] = []
    absent = "none" if results.record.get("complete") is True else "not yet"
    if results.baseline in results.entries:
        loss = estimate(results.entries[results.baseline], "final_loss")
        shown.append(
            _key(f"Final loss, {results.baseline}", numbers.loss(loss and loss.value), loss, numbers.loss, absent)
        )
    entry = results.entries.get(results.headline)
    if entry is not None:
        loss = estimate(entry, "final_loss")
        shown.append(
            _key(f"Final loss, {results.headline}", numbers.loss(loss and loss.value), loss, numbers.loss, absent)
        )
        for key, title in (("tokens", "in tokens"), ("seconds", "in time"), ("flops", "in operations")):
            found = estimate(entry, f"speedup_{key}")
            text = numbers.speedup(found) + ("×" if found else "")
            shown.append(_key(f"Speed-up {title}", text, found, numbers.ratio, absent))
    return tag("dl", *shown, class_="key") if shown else None


def _key(name: str, text: str, found: Estimate | None, write: object, absent: str) -> Markup:
    assert callable(write)
    if found is None:
        note = absent
    elif found.bound is not None:
        note = "a bound only"
    elif found.low is None or found.high is None:
        note = "one seed, no interval"
    else:
        note = f"{write(found.low)} to {write(found.high)}" + (f", {found.n} seeds" if found.n else "")
    return tag("div", tag("dt", name), tag("dd", text, tag("small", note)))


def _conditions(results: Results) -> Markup:
    """One line: budget, model, text, seeds."""
    study = results.study
    model = part(study, "model")
    budgets = ", ".join(numbers.budget(tokens, results.tokens) for tokens in items(study, "budgets"))
    seeds = [str(seed) for seed in items(study, "headline_seeds") or items(study, "seeds")]
    pieces = [
        f"Budget T = {numbers.count(results.tokens)} tokens in steps of {numbers.count(results.tokens_per_step)}"
        if results.tokens
        else None,
        f"{results.baseline} at budgets {budgets}" if budgets and results.baseline else None,
        f"model of {numbers.count(model.get('parameters'))} parameters" if number(model.get("parameters")) else None,
        f"text: {study['text']}" if study.get("text") else None,
        f"seeds {', '.join(seeds)}" if seeds else None,
        "intervals: 95 %, Student's t over seeds",
    ]
    return join([join([piece for piece in pieces if piece], " · ")])
