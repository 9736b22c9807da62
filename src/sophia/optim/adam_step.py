"""Adam's rule by torch's own fused kernel, for those parameters of :class:`SophiaK` that take it as they are.

It is what moves embeddings, whose millions of rows our arithmetic would pass over six times.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from sophia.optim.dtensor import is_dtensor
from sophia.optim.matrix_member import Member
from sophia.optim.matrix_update import ADAM_EPS


def fits(one: Member, own: Mapping[str, Any]) -> bool:
    """Whether torch's kernel takes this parameter: Adam's own, whole, one dtype, and averages that began together."""
    p, grad = one.p, one.p.grad
    if (
        one.hidden
        or one.group["nu"] != 1
        or one.samples_diagonal
        or grad is None
        or is_dtensor(p)
        or "exp_avg_sq" not in own
    ):
        return False
    tensors = (p, grad, own["exp_avg"], own["exp_avg_sq"])
    alike = all(t.dtype is p.dtype and t.is_contiguous() and t.numel() > 0 for t in tensors)
    return alike and p.dtype in (torch.float32, torch.float64) and p.device.type in ("cpu", "cuda")


@torch.no_grad()
def take(
    members: Sequence[Member],
    states: Mapping[Tensor, Mapping[str, Any]],
    group: Mapping[str, Any],
) -> None:
    """One step of AdamW, in place, which also counts it.

    Args:
        members: of one param group, on any devices.
        states: of the optimizer.
        group: their settings.
    """
    beta1, beta2 = group["betas"]
    for device in dict.fromkeys(one.p.device for one in members):
        own = [states[one.p] for one in members if one.p.device == device]
        params = [one.p for one in members if one.p.device == device]
        for state in own:  # the kernel counts on the device
            state["step"] = state["step"].to(device)  # type: ignore[index]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in own],
            [state["exp_avg_sq"] for state in own],
            [],
            [state["step"] for state in own],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=ADAM_EPS,
            maximize=group["maximize"],
        )
