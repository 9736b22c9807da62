"""Which settings mean something to which optimizers: others are refused, not ignored."""

import dataclasses
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from sophia.config import FOREIGN, OPTIMIZERS, OptimizerSettings
from sophia.optim import SophiaK

MATRIX_SETTINGS: Mapping[str, Any] = MappingProxyType(
    {
        name: inspect.signature(SophiaK).parameters[name].default
        for name in (
            "basis",
            "factors",
            "diagonal",
            "exponent",
            "clip",
            "orthogonalize",
            "update_rms",
            "nesterov",
            "others",
            "nu",
        )
    }
    | {"split_qkv": True, "product_dtype": "auto"}
)
"""What only Sophia-K has, with what it is if nothing is said: under the names of :class:`SophiaK`'s arguments; but
`split_qkv` is its `split` for one kind of matrix, and `product_dtype` has names as those of the other dtypes here."""
_DIAGONAL = ("sophia-g", "sophia-h")
_SOPHIA = (*_DIAGONAL, "sophia-k")
# Settings that not all optimizers have. Of those that have one the first is named in errors.
_ONLY: Mapping[str, tuple[str, ...]] = {
    "beta2": (*(name for name in OPTIMIZERS if name != "signum"), FOREIGN),
    "arguments": (FOREIGN,),
    "basis_interval": ("soap",),
    "gamma": _SOPHIA,
    "clip_target": _DIAGONAL,
    "eps": _SOPHIA,
    "bias_correction": _DIAGONAL,
    "curvature_interval": _SOPHIA,
    "refresh_when": _SOPHIA,
    "curvature_rows": _SOPHIA,
    "curvature_chunks": _SOPHIA,
    "curvature_noise": ("sophia-g", "sophia-k"),
    "state_dtype": _SOPHIA,
    **dict.fromkeys(MATRIX_SETTINGS, ("sophia-k",)),
}
# What an estimate of curvature is made of.
ESTIMATE = ("curvature_rows", "curvature_chunks", "curvature_noise")
# What config.toml of earlier versions holds for every optimizer.
_WRITTEN_FOR_ALL: Mapping[str, str] = {"curvature_noise": "labels"}


def check_meaning(chosen: OptimizerSettings) -> None:
    """Refuse a setting that is not as it stands by default, and that this optimizer does not have.

    Raises:
        ValueError: There is one.
    """
    if chosen.optimizer == "sophia-h" and chosen.curvature_chunks is not None:
        raise ValueError(
            "curvature_chunks has no meaning for sophia-h, whose noise belongs to parameters: leave it out"
        )
    if chosen.optimizer == "sophia-k" and chosen.gamma == "auto":
        raise ValueError(
            "gamma is auto, which follows coordinates in one basis, and sophia-k has one for each matrix: give a number"
        )
    if chosen.optimizer == "sophia-k" and not estimates_curvature("sophia-k", vars(chosen)):
        for name in ESTIMATE:
            if getattr(chosen, name) is not None:
                raise ValueError(
                    f"{name} is {getattr(chosen, name)}, but this sophia-k is made of gradients alone and estimates no "
                    "curvature: leave it out, or choose diagonal curvature"
                )
    for one in dataclasses.fields(chosen):
        value = getattr(chosen, one.name)
        if value != one.default and value != _WRITTEN_FOR_ALL.get(one.name):
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


def estimates_curvature(optimizer: str, chosen: Mapping[str, Any]) -> bool:
    """Whether an optimizer with these settings, by name, estimates curvature; Sophia-K may do without."""
    if optimizer != "sophia-k":
        return optimizer in _SOPHIA
    known = {name: default if chosen.get(name) is None else chosen[name] for name, default in MATRIX_SETTINGS.items()}
    made_of = [known["diagonal"], known["others"], *([] if known["basis"] == "none" else [known["factors"]])]
    return "curvature" in made_of
