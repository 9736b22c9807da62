"""The state of a parameter, from nothing and from a state dict.

`step`, `exp_avg` (m), `hessian` (h), and with bias_correction `refreshes`: how many estimates h is the average of.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.optim import checks
from sophia.optim.clock import FIELDS
from sophia.optim.reach import UNREACHED

# Of SophiaK: never rounded to a chosen state dtype.
EXACT = ("exp_avg_sq", "row_statistics", "row_basis", "column_statistics", "column_basis")


def dtype_of_state(p: Tensor, chosen: torch.dtype | None) -> torch.dtype:
    """The dtype of m and h: the one chosen, else fp32, and fp64 for fp64 parameters."""
    return chosen or torch.promote_types(p.dtype, torch.float32)


def complete(state: dict[str, Any], p: Tensor, dtype: torch.dtype, *, counted: bool) -> dict[str, Any]:
    """Start what is missing in a parameter's state anew, with the parameter's layout and sharding.

    counted: whether refreshes are. An h without a count is an average that starts anew with the next estimate.
    """
    if not counted:
        state.pop("refreshes", None)
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32)
    if counted and "refreshes" not in state:
        state["refreshes"] = torch.zeros((), dtype=torch.float32)
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    if "hessian" not in state:
        state["hessian"] = torch.full_like(p, UNREACHED, dtype=dtype, memory_format=torch.preserve_format)
    return state


def count_estimate(state: dict[str, Any], beta2: float) -> float:
    """Count one more estimate where they are counted. Returns the decay of h as the estimate is folded in.

    That is β2, or where they are counted 1 − (1 − β2) / (1 − β2ⁿ) for the n-th: h is then h_n / (1 − β2ⁿ) of the plain
    recursion, the bias-corrected average.
    """
    if "refreshes" not in state:
        return beta2
    state["refreshes"] += 1
    return 1 - (1 - beta2) / (1 - beta2 ** int(state["refreshes"]))


def adopt_state(state: dict[str, Any], loaded: dict[str, Any], p: Tensor, dtype: torch.dtype) -> None:
    """Replace what torch has loaded by copies in the dtype of the state.

    torch casts state to the parameter's dtype, which would round fp32 curvature to bf16, and shares tensors with the
    state dict.
    """
    for name, value in loaded.items():
        if name in ("exp_avg", "hessian"):
            state[name] = value.to(device=p.device, dtype=dtype, copy=True)
        elif name in EXACT:
            state[name] = value.to(device=p.device, dtype=dtype_of_state(p, None), copy=True)
        elif name in ("step", "refreshes"):  # on the host, the former until a step needs it elsewhere
            state[name] = torch.tensor(float(value), dtype=torch.float32)


def adopt_settings(groups: Sequence[dict[str, Any]], own: Sequence[dict[str, Any]], steps: int) -> None:
    """Settings that loaded groups lack take the optimizer's own values.

    Groups without a clock come from another optimizer, or another Sophia: its steps are ours, and no refresh is. How a
    step is computed is a matter of the place, so those settings stay as they are.
    """
    for group, before in zip(groups, own, strict=True):
        if "clock" not in group:
            group.update({**FIELDS, "clock": steps})
            group.update({name: before[name] for name in ("curvature_interval", "seed")})
        group["clock"] = int(group["clock"])  # a device's counter is the number that it shows
        group.update({name: before[name] for name in checks.PATHS})
        for name, value in before.items():
            group.setdefault(name, value)
