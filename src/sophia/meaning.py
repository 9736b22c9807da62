"""Which settings mean something to which optimizers: others are refused, not ignored."""

import dataclasses
from collections.abc import Mapping

from sophia.config import FOREIGN, OPTIMIZERS, OptimizerSettings

_SOPHIA = ("sophia-g", "sophia-h")
# Settings that not all optimizers have. Of those that have one the first is named in errors.
_ONLY: Mapping[str, tuple[str, ...]] = {
    "beta2": (*(name for name in OPTIMIZERS if name != "signum"), FOREIGN),
    "arguments": (FOREIGN,),
    "basis_interval": ("soap",),
    "gamma": _SOPHIA,
    "clip_target": _SOPHIA,
    "eps": _SOPHIA,
    "bias_correction": _SOPHIA,
    "curvature_interval": _SOPHIA,
    "refresh_when": _SOPHIA,
    "curvature_rows": _SOPHIA,
    "curvature_chunks": _SOPHIA,
    "curvature_noise": ("sophia-g",),
    "state_dtype": _SOPHIA,
}


def check_meaning(chosen: OptimizerSettings) -> None:
    """Refuse a setting that is not as it stands by default, and that this optimizer does not have.

    Raises:
        ValueError: There is one.
    """
    if chosen.optimizer == "sophia-h" and chosen.curvature_chunks is not None:
        raise ValueError(
            "curvature_chunks has no meaning for sophia-h, whose noise belongs to parameters: leave it out"
        )
    for one in dataclasses.fields(chosen):
        if getattr(chosen, one.name) != one.default:
            check_name(one.name, chosen.optimizer)


def check_name(name: str, optimizer: str) -> None:
    """Refuse a setting by its name, whatever its value: for what somebody asked for.

    Raises:
        ValueError: This optimizer does not have it.
    """
    kind = FOREIGN if ":" in optimizer else optimizer
    others = _ONLY.get(name, (kind,))
    if kind not in others:
        raise ValueError(f"{name} has no meaning for {optimizer}: leave it out, or choose {others[0]}")
