"""What a user of :class:`SophiaK` may get wrong: the value, the reason, the remedy."""

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor

from sophia.optim import checks, kronecker
from sophia.optim.curvature import GaussNewtonBartlett
from sophia.optim.dtensor import is_dtensor, local
from sophia.optim.matrix_owners import cuts

P = ParamSpec("P")

SOURCES = ("curvature", "gradients")
_OF_BASES = ("factors", "rtol", "max_basis_dim")
_OF_MATRICES = (
    "basis",
    *_OF_BASES,
    "diagonal",
    "exponent",
    "clip",
    "orthogonalize",
    "nesterov",
    "split",
    "product_dtype",
)


def checked_estimator(estimator: object) -> GaussNewtonBartlett:
    """The estimator, which must give gradients and not only a diagonal."""
    chosen = GaussNewtonBartlett(noise="signs") if estimator is None else estimator
    if not isinstance(chosen, GaussNewtonBartlett):
        raise ValueError(
            f"estimator={chosen!r} gives no sampled gradients for the factors: SophiaK needs "
            "sophia.curvature.GaussNewtonBartlett(), or None"
        )
    return chosen


def check_group(group: dict[str, Any]) -> None:
    """Check the settings that only SophiaK has, and its parameters."""
    for name, choices in (
        ("basis", kronecker.SIDES),
        ("factors", SOURCES),
        ("diagonal", SOURCES),
        ("others", SOURCES),
    ):
        if group[name] not in choices:
            raise ValueError(f"{name}={group[name]!r} must be one of {', '.join(map(repr, choices))}")
    for name in ("hidden", "clip", "nesterov"):
        if not isinstance(group[name], bool):
            raise ValueError(f"{name}={group[name]!r} must be True or False")
    for name, least in (("orthogonalize", 0), ("max_basis_dim", 1), ("split", 1)):
        if not checks.is_whole(group[name]) or group[name] < least:
            raise ValueError(f"{name}={group[name]!r} must be a whole number of at least {least}")
    if isinstance(group["product_dtype"], torch.dtype):  # its name is what a checkpoint can hold
        group["product_dtype"] = _name_of(group["product_dtype"])
    if group["product_dtype"] not in (None, "auto", "bfloat16", "float32", "float64"):
        raise ValueError(
            f"product_dtype={group['product_dtype']!r} must be torch.bfloat16, torch.float32, 'auto' or None"
        )
    _check_numbers(group)
    if group["clip_target"] is not None:
        raise ValueError(
            "gamma='auto' (a clip_target) follows coordinates in one basis; SophiaK has several: give gamma a number"
        )
    for name in ("foreach", "capturable"):
        if group[name]:
            raise ValueError(f"{name}=True: SophiaK has no such path, as products of matrices have none; leave it out")
    elsewhere = {p.device.type for p in group["params"]} - {"cpu"}
    if group["fused"] and elsewhere:
        raise ValueError(
            f"fused=True: SophiaK's passes over memory are fused on the CPU only, and there are parameters on "
            f"{elsewhere.pop()}; leave it out"
        )
    _check_shards(group["params"], group["hidden"])
    _check_split(group)


def _check_numbers(group: Mapping[str, Any]) -> None:
    if not checks.is_number(group["exponent"]) or not 0 <= group["exponent"] < math.inf:
        raise ValueError(
            f"exponent={group['exponent']!r} must be a finite number of at least 0, where D counts for nothing"
        )
    if not checks.is_number(group["nu"]) or not 0 <= group["nu"] <= 1:
        raise ValueError(f"nu={group['nu']!r} must be a number between 0 and 1 (1 is Adam's rule)")
    if group["update_rms"] is not None:
        _above_zero("update_rms", group["update_rms"], "or None")
    if not checks.is_number(group["rtol"]) or not 0 <= group["rtol"] < 1:
        raise ValueError(f"rtol={group['rtol']!r} must be a number of at least 0 and less than 1")


def refuse_idle(init: Callable[P, None]) -> Callable[P, None]:
    """Let a constructor refuse arguments that, now that all groups are known, change nothing in any of them."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        init(*args, **kwargs)
        without = [idle(group) for group in args[0].param_groups]  # type: ignore[attr-defined]
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            reasons = [reason[name] for reason in without if name in reason]
            if len(reasons) == len(without) and value != signature.parameters[name].default:
                raise ValueError(_has_no_effect(name, value, reasons[0]))

    return checked


def check_idle(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse a new group's own settings that change nothing under the others."""
    without = idle({**defaults, **given})
    for name, value in given.items():
        stored = _name_of(value) if isinstance(value, torch.dtype) else value
        if name in without and stored != defaults.get(name):
            raise ValueError(_has_no_effect(name, value, without[name]))


def idle(group: Mapping[str, Any]) -> dict[str, str]:
    """Settings that change nothing under the settings of a group, and why."""
    found: dict[str, str] = {}
    hidden, turned = group["hidden"], group["hidden"] and group["basis"] != "none"
    sophia = group["others"] == "curvature"
    if sophia:
        found["nu"] = "others='curvature', and it is a setting of Adam's rule"
    if not hidden:
        found |= dict.fromkeys(_OF_MATRICES, "hidden=False, and it is a setting of hidden matrices")
        if not sophia:
            reason = "hidden=False, and others='gradients' is Adam's rule, which has none (its epsilon is 1e-8)"
            found |= dict.fromkeys(("gamma", "eps", "update_rms"), reason)
    elif not turned:
        found |= dict.fromkeys(_OF_BASES, "basis='none' turns nothing")
        if not group["orthogonalize"]:
            if group["update_rms"] is None:
                found["split"] = "basis='none', orthogonalize=0 and update_rms=None take every entry on its own"
            found["product_dtype"] = "basis='none' and orthogonalize=0 need no products"
    if turned and group["exponent"] == 0:
        found["rtol"] = "exponent=0 divides by no curvature"
    sampled = sophia or (hidden and group["diagonal"] == "curvature") or (turned and group["factors"] == "curvature")
    if not sampled:
        found["estimator"] = "factors, diagonal and others are made of gradients"
        if not turned:
            found["curvature_interval"] = "neither curvature nor a basis is made"
    return found


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _has_no_effect(name: str, value: object, reason: str) -> str:
    return f"{name}={value!r} has no effect: {reason}; leave it out"


def check_bias_correction(given: dict[str, Any]) -> None:
    """Refuse what SophiaK cannot switch off. (Groups loaded from another Sophia may say so: it is not read.)"""
    if not given.get("bias_correction", True):
        raise ValueError("bias_correction=False: the curvature of SophiaK is always bias-corrected; leave it out")


def check_embeddings(hidden: Collection[Tensor], embeddings: Mapping[Tensor, str]) -> None:
    """Refuse embeddings, given with their names, among the hidden matrices."""
    found = [f"{name} of shape {tuple(p.shape)}" for p, name in embeddings.items() if p in hidden]
    if found:
        raise ValueError(
            f"{', '.join(found)} is an embedding, whose rows are rarely all in use, and is in a group of hidden "
            "matrices, where it would move several times as far as meant: build the optimizer from "
            'SophiaK.groups(model), or give it to a group with "hidden": False'
        )


def _above_zero(name: str, value: object, alternative: str = "") -> None:
    if not checks.is_number(value) or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
        raise ValueError(f"{name}={value!r} must be a finite number above 0 {alternative}".rstrip())


def _check_shards(params: Sequence[Tensor], hidden: bool) -> None:
    for index, p in enumerate(params):
        if not (hidden and p.ndim == 2 and is_dtensor(p)):
            continue
        cut = [p.placements[number] for number in cuts(p)]
        if len(cut) > 1 or any(type(placement).__name__ != "Shard" for placement in cut):
            raise ValueError(
                f"parameter {index} of shape {tuple(p.shape)} is a DTensor with placements {p.placements}: SophiaK "
                "puts hidden matrices together from shards along one dimension of the mesh (FSDP2, HSDP); give it to a "
                'group with "hidden": False, or use SophiaG'
            )


def _check_split(group: Mapping[str, Any]) -> None:
    for index, p in enumerate(group["params"]):
        if group["hidden"] and p.ndim == 2 and max(p.shape) % group["split"]:
            raise ValueError(
                f"split={group['split']}: parameter {index} of shape {tuple(p.shape)} is not so many matrices of one "
                "shape beside each other along its longer side; give such weights to a group of their own"
            )


def check_estimates(estimates: Sequence[Tensor | None], params: Sequence[Tensor], matrices: Collection[Tensor]) -> None:
    """Check curvature that a user hands over: [chunks, rows, columns] for hidden matrices."""
    if isinstance(estimates, Tensor) or not isinstance(estimates, Sequence) or len(estimates) != len(params):
        checks.check_estimates(estimates, params)
    shown: list[Tensor | None] = []
    for index, (estimate, p) in enumerate(zip(estimates, params, strict=True)):
        if isinstance(estimate, Tensor) and p in matrices:
            if estimate.dim() != 3 or len(estimate) == 0:
                raise ValueError(
                    f"estimate {index} has shape {tuple(estimate.shape)}, its parameter is a hidden matrix of shape "
                    f"{tuple(p.shape)}: give its sampled gradients over the root of the number of predictions, "
                    "[chunks, rows, columns]"
                )
            shown.append(estimate[0])
            continue
        shown.append(estimate)
    checks.check_estimates(shown, params)
    for index, (estimate, p) in enumerate(zip(estimates, params, strict=True)):
        if estimate is not None and p not in matrices and bool((local(estimate) < 0).any()):
            raise ValueError(f"estimate {index} has negative entries, which SophiaK has no meaning for")
