"""What a step of SophiaK does entry by entry, on the CPU: one pass over memory each, as the step of `cpu`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sophia.optim.kernels.cpu import by_dtypes, run, sign, words


def ahead_(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    aheads: list[Tensor],
    *,
    beta1: float,
    share: float,
    maximize: bool,
    keys: Sequence[int],
    step: int | Tensor,
    grad_scale: Tensor | None,
) -> list[int]:
    """m ← β1 m + (1 − β1) g in place, and into `aheads`, of any dtype, m + share (g − m).

    Returns:
        The indices of the tensors that there is no loop for.
    """
    constants = [1.0 - beta1, sign(maximize, grad_scale), share]
    groups, left = by_dtypes(grads, exp_avgs, aheads)
    for dtypes, indices in groups.items():
        noisy = dtypes[1] == torch.bfloat16
        columns = [[column[i] for i in indices] for column in (grads, exp_avgs, aheads)]
        run("cpu_matrix_loops.ahead_loop", (*dtypes, noisy), columns, words(keys, indices, step, noisy), constants)
    return left


def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    nu: float,
    eps: float,
    weight_decay: float,
    count: int,
    maximize: bool,
    keys: Sequence[int],
    step: int | Tensor,
    grad_scale: Tensor | None,
) -> list[int]:
    """One step of AdamW, quasi-hyperbolic for ν < 1, in place.

    Args:
        count: steps of these tensors, with this one.

    Returns:
        The indices of the tensors that there is no loop for.
    """
    beta1, beta2 = betas
    constants = [1.0 - beta1, 1.0 - beta2, sign(maximize, grad_scale)]
    constants += [nu / (1.0 - beta1**count), 1.0 - nu, 1.0 / (1.0 - beta2**count), eps, lr, 1.0 - lr * weight_decay]
    groups, left = by_dtypes(params, grads, exp_avgs, exp_avg_sqs)
    for dtypes, indices in groups.items():
        noisy = dtypes[2] == torch.bfloat16
        columns = [[column[i] for i in indices] for column in (params, grads, exp_avgs, exp_avg_sqs)]
        run("cpu_matrix_loops.adam_loop", (*dtypes, noisy), columns, words(keys, indices, step, noisy), constants)
    return left


def add_(
    params: list[Tensor], updates: list[Tensor], factors: list[Tensor], *, lr: float, weight_decay: float
) -> list[int]:
    """θ ← (1 − η λ) θ − η · factor · u in place, each with a factor of one element.

    Returns:
        The indices of the tensors that there is no loop for.
    """
    groups, left = by_dtypes(params, updates)
    for dtypes, indices in groups.items():
        columns = [[column[i] for i in indices] for column in (params, updates, factors)]
        variant = (*dtypes, factors[indices[0]].dtype)
        run("cpu_matrix_loops.add_loop", variant, columns, [0] * len(indices), [lr, 1.0 - lr * weight_decay])
    return left
