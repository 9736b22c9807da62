"""Named parameters in groups: exceptions from the weight decay and from the learning rate, by name."""

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sophia.config import OptimizerSettings

NamedParameters = list[tuple[str, nn.Parameter]]


class _Exceptions:
    """PATTERN=NUMBER texts of one setting; the first pattern that matches a name holds."""

    def __init__(self, setting: str, texts: Sequence[str], read: Callable[[str], tuple[str, float]]) -> None:
        self.setting = setting
        self.pairs = [read(text) for text in texts]
        self.hit = [False] * len(self.pairs)

    def value(self, name: str) -> float | None:
        """The exception for a parameter, if there is one."""
        for index, (pattern, value) in enumerate(self.pairs):
            if fnmatch.fnmatchcase(name, pattern):
                self.hit[index] = True
                return value
        return None

    def check_all_hit(self, names: Sequence[str]) -> None:
        """Refuse a pattern that decided nothing."""
        for (pattern, _), hit in zip(self.pairs, self.hit, strict=True):
            if not hit:
                raise ValueError(
                    f"{self.setting}: {pattern} matches no parameter that an earlier pattern left; names begin with "
                    f"{', '.join(names[:4])}"
                )


def parameter_groups(settings: OptimizerSettings, named: NamedParameters) -> list[dict[str, Any]]:
    """Groups of named parameters, for any optimizer of torch's make: `params`, `weight_decay`, `lr`.

    Matrices decay and vectors do not; the learning rate is one for all; exceptions from both go by name. What the
    settings leave open is not in the groups.

    Raises:
        ValueError: An exception is not PATTERN=NUMBER, or decides nothing.
    """
    decays = _Exceptions("decay_by_name", settings.decay_by_name, _decay)
    factors = _Exceptions("lr_by_name", settings.lr_by_name, _factor)
    groups: dict[tuple[float, float], NamedParameters] = {}
    for full_name, parameter in named:
        name = full_name.removeprefix("module.")
        own, factor = decays.value(name), factors.value(name)
        decay = own if own is not None else float(settings.weight_decay or 0.0) if parameter.ndim >= 2 else 0.0
        groups.setdefault((decay, 1.0 if factor is None else factor), []).append((name, parameter))
    names = [name.removeprefix("module.") for name, _ in named]
    decays.check_all_hit(names)
    factors.check_all_hit(names)
    found = []
    for (decay, factor), params in groups.items():
        group: dict[str, Any] = {"params": params}
        if settings.weight_decay is not None or settings.decay_by_name:
            group["weight_decay"] = decay
        if settings.lr is not None:
            group["lr"] = settings.lr * factor
        found.append(group)
    return found


def _decay(text: str) -> tuple[str, float]:
    pattern, decay = _pair(text)
    if not pattern or not 0.0 <= decay < math.inf:
        raise ValueError(f"decay_by_name: {text!r} is not PATTERN=DECAY with a decay of at least 0, as 'tokens.*=0'")
    return pattern, decay


def _factor(text: str) -> tuple[str, float]:
    pattern, factor = _pair(text)
    if not pattern or not 0.0 < factor < math.inf:
        raise ValueError(f"lr_by_name: {text!r} is not PATTERN=FACTOR with a factor above 0, as 'tokens.*=0.5'")
    return pattern, factor


def _pair(text: str) -> tuple[str, float]:
    """The two sides of the last '='; what is no number is NaN, and lies in no range."""
    pattern, _, value = text.rpartition("=")
    try:
        return pattern, float(value)
    except ValueError:
        return pattern, math.nan
