"""What a user of :class:`SophiaK` may get wrong: the value, the reason, the remedy."""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.optim import checks, kronecker
from sophia.optim.curvature import GaussNewtonBartlett
from sophia.optim.dtensor import is_dtensor, local
from sophia.optim.matrix_owners import cuts

SOURCES = ("curvature", "gradients")


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
    for name, least in (("orthogonalize", 0), ("max_basis_dim", 1)):
        if not checks.is_whole(group[name]) or group[name] < least:
            raise ValueError(f"{name}={group[name]!r} must be a whole number of at least {least}")
    if isinstance(group["product_dtype"], torch.dtype):  # its name is what a checkpoint can hold
        group["product_dtype"] = str(group["product_dtype"]).removeprefix("torch.")
    if group["product_dtype"] not in (None, "bfloat16", "float32", "float64"):
        raise ValueError(f"product_dtype={group['product_dtype']!r} must be torch.bfloat16, torch.float32 or None")
    _above_zero("exponent", group["exponent"])
    if group["update_rms"] is not None:
        _above_zero("update_rms", group["update_rms"], "or None")
    if group["clip_target"] is not None:
        raise ValueError(
            "gamma='auto' (a clip_target) follows coordinates in one basis; SophiaK has several: give gamma a number"
        )
    for name in checks.PATHS:
        if group[name]:
            raise ValueError(f"{name}=True: SophiaK has one path, products of matrices; leave it out")
    _check_shards(group["params"], group["hidden"])


def check_bias_correction(given: dict[str, Any]) -> None:
    """Refuse what SophiaK cannot switch off. (Groups loaded from another Sophia may say so: it is not read.)"""
    if not given.get("bias_correction", True):
        raise ValueError("bias_correction=False: the curvature of SophiaK is always bias-corrected; leave it out")


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
