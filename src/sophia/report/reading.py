"""What the report reads out of results.json, of which any part may not be there yet."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

Record = Mapping[str, Any]


class Estimate(NamedTuple):
    """A mean over seeds with its interval."""

    value: float
    low: float | None
    high: float | None
    n: int | None
    """Seeds; None where it is not said."""
    bound: str | None
    """"at least" or "at most" where the true value is beyond what was measured."""

    def excludes(self, neutral: float) -> bool:
        """Whether the interval says on which side of `neutral` the value lies."""
        return self.low is not None and self.high is not None and not self.low <= neutral <= self.high


def number(value: object) -> float | None:
    """A finite number, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def part(record: object, key: str) -> Record:
    """The mapping under a key; empty where there is none."""
    found = record.get(key) if isinstance(record, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def items(record: object, key: str) -> list[Any]:
    """The list under a key; empty where there is none."""
    found = record.get(key) if isinstance(record, Mapping) else None
    return list(found) if isinstance(found, list | tuple) else []


def records(record: object, key: str) -> list[Record]:
    """The mappings in the list under a key."""
    return [found for found in items(record, key) if isinstance(found, Mapping)]


def estimate(record: object, key: str) -> Estimate | None:
    """The estimate under a key, whether its centre is called mean or value; None where it has no number."""
    found = part(record, key)
    value = number(found.get("value", found.get("mean")))
    if value is None:
        return None
    count = number(found.get("n"))
    bound = found.get("bound")
    return Estimate(
        value,
        number(found.get("low")),
        number(found.get("high")),
        None if count is None else int(count),
        str(bound) if bound else None,
    )


def claimed(entry: Record, key: str, found: Estimate) -> bool:
    """Whether a speed-up may be claimed: the judge's own word, and the interval where the judge has none.

    A bound has no interval: the judge's word on tokens holds for operations, too.
    """
    word = entry.get({"speedup_tokens": "claim", "speedup_seconds": "claim_seconds"}.get(key, ""))
    if found.bound is not None and not isinstance(word, bool):
        word = entry.get("claim")
    return word if isinstance(word, bool) else found.excludes(1.0)


@dataclass(frozen=True)
class Results:
    """results.json, read with patience."""

    record: Record
    """The whole of it."""

    @cached_property
    def study(self) -> Record:
        """What was asked."""
        return part(self.record, "study")

    @cached_property
    def baseline(self) -> str:
        """The entry that the others are measured against."""
        return str(self.record.get("baseline") or "")

    @cached_property
    def headline(self) -> str:
        """The entry that the verdict is about; empty: none."""
        return str(self.record.get("headline") or "")

    @cached_property
    def entries(self) -> dict[str, Record]:
        """Optimizers in the study's order."""
        return {
            str(name): entry if isinstance(entry, Mapping) else {}
            for name, entry in part(self.record, "optimizers").items()
        }

    @cached_property
    def ranked(self) -> list[str]:
        """Optimizers by their loss at the end, those without one last."""
        losses = {name: estimate(entry, "final_loss") for name, entry in self.entries.items()}

        def rank(name: str) -> float:
            loss = losses[name]
            return math.inf if loss is None else loss.value

        return sorted(self.entries, key=rank)

    @cached_property
    def runs(self) -> list[Record]:
        """All finished runs."""
        return records(self.record, "runs")

    @property
    def tokens(self) -> float | None:
        """The budget T."""
        return number(self.study.get("tokens"))

    @property
    def tokens_per_step(self) -> float | None:
        """The batch at which all are compared."""
        return number(self.study.get("tokens_per_step"))

    def finals(self, name: str) -> list[Record]:
        """An entry's runs that count, at budget T and the common batch."""
        return [
            run
            for run in self.runs
            if run.get("role") == "final"
            and run.get("optimizer") == name
            and number(run.get("tokens")) == self.tokens
            and number(run.get("tokens_per_step")) == self.tokens_per_step
        ]
