"""The headline in one honest sentence."""

import re
from collections.abc import Mapping
from typing import Any

from sophia.study.flags import amount

Numbers = Mapping[str, Any]


def sentence(results: Mapping[str, Any], missing: str) -> str:
    """What the results say about the headline entry against the baseline, with numbers and units.

    Args:
        results: As in results.json; `verdict` is not read.
        missing: What it waits for; empty where nothing is.
    """
    name, baseline = results["headline"], results["baseline"]
    if name is None:
        return f"No verdict: the study names no headline entry to hold against {baseline}."
    if missing:
        yet = "" if results["complete"] else " yet"
        return f"No verdict{yet} on {name} against {baseline}: {missing}."
    found = results["optimizers"][name]
    tokens, seconds = found["speedup_tokens"], found["speedup_seconds"]
    if tokens["value"] is None:
        return (
            f"No verdict on {name} against {baseline}: the losses lie on both sides of what {baseline} was run at"
            f"{_where(results, tokens)}."
        )
    facts = (
        f"for the loss of {name} after {amount(results['study']['tokens'])} tokens, {baseline} needs "
        f"{_times(tokens)} the tokens and {_times(seconds)} the time"
    )
    judgement = _judgement(found, name, baseline)
    if not results["study"]["trials"]:
        judgement = f"Untuned, so no verdict on {name} against {baseline}"
    return f"{judgement}: {facts}{_where(results, tokens)}."


def _judgement(found: Mapping[str, Any], name: str, baseline: str) -> str:
    tokens, seconds = _direction(found, "tokens"), _direction(found, "seconds")
    if tokens == seconds:
        return {
            1: f"{name} saves tokens and time against {baseline}",
            0: f"No saving shown by {name} against {baseline}",
            -1: f"{name} costs tokens and time against {baseline}",
        }[tokens]
    in_tokens = {1: "saves tokens", 0: "shows no saving in tokens", -1: "costs tokens"}[tokens]
    in_time = {1: "saves time", 0: "shows no saving in time", -1: "costs time"}[seconds]
    joint = "and" if tokens * seconds == 0 and tokens + seconds < 0 else "but"
    return f"{name} {in_tokens} {joint} {in_time} against {baseline}"


def _direction(found: Mapping[str, Any], currency: str) -> int:
    """1: faster, -1: slower, 0: cannot be told."""
    claim = found["claim" if currency == "tokens" else "claim_seconds"]
    if not claim:
        return 0
    speedup = found[f"speedup_{currency}"]
    if speedup["bound"] is not None:
        return 1 if speedup["bound"] == "at least" else -1
    return 1 if speedup["value"] > 1 else -1


def _times(speedup: Numbers) -> str:
    if speedup["value"] is None:
        return "an unknown multiple of"
    if speedup["bound"] is not None:
        return f"{speedup['bound']} {speedup['value']:.2f} times"
    if speedup["low"] is None:
        return f"{speedup['value']:.2f} times (one seed, no interval)"
    return f"{speedup['value']:.2f} times [{speedup['low']:.2f}, {speedup['high']:.2f}]"


def _where(results: Mapping[str, Any], tokens: Numbers) -> str:
    study = results["study"]
    model, n = study["model"], tokens["n"]
    seeds = f"{n} seed{'s' if n != 1 else ''}"
    parts = [
        seeds if tokens["low"] is None else f"95 % intervals over {seeds}",
        f"{model['model']}, {amount(model['parameters'])} parameters",
        f"text: {re.split(r' *[(:;,]', study['text'])[0]}",
    ]
    return f" ({'; '.join(parts)})"
