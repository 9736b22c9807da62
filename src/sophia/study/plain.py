"""Settings, trials, costs and estimates as results.json has them: plain values under every key, None where none is."""

import dataclasses
from typing import Any

from sophia.study.measured import Cost
from sophia.study.plan import Trial
from sophia.study.runs import Settings
from sophia.study.statistics import Estimate

_COST = ("seconds_per_step", "ratio", "ratio_low", "ratio_high", "rounds", "flops_per_step", "peak_memory_bytes")


def settings(found: Settings | None) -> dict[str, Any] | None:
    """Settings by name, lists as JSON has them."""
    if found is None:
        return None
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found}


def trial(found: Trial) -> dict[str, Any]:
    """A run of a search."""
    return {"settings": settings(found.spec.settings), "loss": found.loss, "why": found.why, "id": found.spec.id}


def cost(found: Cost | None) -> dict[str, Any] | None:
    """What an update costs."""
    return None if found is None else {name: getattr(found, name) for name in _COST}


def estimate(found: Estimate | None) -> dict[str, Any]:
    """A speed-up."""
    if found is None:
        return {"value": None, "low": None, "high": None, "n": 0, "bound": None}
    return dataclasses.asdict(found)


def difference(found: Estimate | None) -> dict[str, Any]:
    """A difference of losses, which is never a bound."""
    return {name: value for name, value in estimate(found).items() if name != "bound"}


def loss(found: Estimate | None) -> dict[str, Any]:
    """A mean loss."""
    return {("mean" if name == "value" else name): value for name, value in difference(found).items()}
