"""The state of the official SophiaG as ours."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from sophia.convert.settings import from_official, positive
from sophia.optim import checks
from sophia.optim.clock import FIELDS


def official_state_dict(
    state_dict: Mapping[str, Any], *, predictions: float, bs: float = 5120, curvature_interval: int = 10
) -> dict[str, Any]:
    """A state dict of the official SophiaG as one that :class:`~sophia.SophiaG` loads.

    `hessian` is multiplied by N, `rho` becomes `gamma` as in :func:`from_official`, `step` and `exp_avg` stay, and the
    refreshes are taken to have been after every k-th step. A hessian of nothing but zeros is taken for curvature that
    no estimate has reached: its parameter holds still until the next refresh. The given state dict is left as it is.

    Args:
        state_dict: of the optimizer, for example `torch.load("ckpt.pt")["optimizer"]`. Its groups must hold the
            parameters in the order of the new optimizer's.
        predictions, bs, curvature_interval: as for :func:`from_official`.

    Raises:
        ValueError: the state dict is not the official SophiaG's, or holds curvature that is not finite or negative.
    """
    _check_official(state_dict)
    if not checks.is_whole(curvature_interval) or curvature_interval < 1:
        raise ValueError(f"curvature_interval={curvature_interval!r} must be a whole number of steps, at least 1")
    factor = positive("predictions", predictions)
    state = {index: _official_state(index, one, factor) for index, one in state_dict["state"].items()}
    steps = max((int(one["step"]) for one in state.values()), default=0)
    clock = {**FIELDS, "curvature_interval": curvature_interval, "clock": steps}
    del clock["seed"]  # the new optimizer's
    if any("hessian" in one for one in state.values()):
        past = steps // curvature_interval
        clock.update(last_refresh=past * curvature_interval, accepted_refreshes=max(past, 1))
    elif steps >= curvature_interval:
        warnings.warn(
            f"hessian is zero everywhere after {steps} steps, so update_hessian() was never called, and those were "
            "steps of sign momentum: with curvature they will be smaller, and lr may have to be another",
            stacklevel=2,
        )
    groups = []
    for group in state_dict["param_groups"]:
        names = ("lr", "betas", "rho", "weight_decay", "maximize", "capturable")
        settings = from_official(
            **{name: group[name] for name in names if name in group},
            predictions=predictions,
            bs=bs,
            curvature_interval=curvature_interval,
        )
        del settings["estimator"]  # of the optimizer, not of a group
        groups.append({**{name: value for name, value in group.items() if name != "rho"}, **settings, **clock})
    return {"state": state, "param_groups": groups}


def _check_official(state_dict: Mapping[str, Any]) -> None:
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        found = ", ".join(map(repr, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            f"this is no state dict of an optimizer, as it has no 'state' and 'param_groups', but {found}: of a "
            'checkpoint of the official script give checkpoint["optimizer"]'
        )
    for number, group in enumerate(state_dict["param_groups"]):
        if "clock" in group:
            raise ValueError(f"param group {number} is of this library already: load the state dict as it is")
        if "rho" not in group:
            raise ValueError(
                f"param group {number} has no 'rho', only {', '.join(map(repr, group))}: it is not of the official "
                "SophiaG (or of its first versions, which had no rho); load the model's weights alone"
            )


def _official_state(index: object, one: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """One parameter's state, in fp32 or fp64 where it was of less, as hessian times factor is large."""
    converted = {**one, "step": torch.tensor(float(one["step"]), dtype=torch.float32)}
    hessian = converted.pop("hessian", None)
    if hessian is None or not bool(hessian.any()):
        return converted
    if not bool((torch.isfinite(hessian) & (hessian >= 0)).all()):
        raise ValueError(
            f"hessian of parameter {index} has entries that are not finite or negative, which an average of squares "
            "cannot have: load the model's weights alone, or an earlier checkpoint"
        )
    return {**converted, "hessian": hessian.to(torch.promote_types(hessian.dtype, torch.float32)) * factor}
