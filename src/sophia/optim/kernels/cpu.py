"""The fused path on the CPU: one pass over all tensors of equal dtypes, by loops that numba compiles.

numba is imported with the first step, and a loop compiled, in about a second, when its dtypes are first met.
"""

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.optim.kernels import team
from sophia.optim.layout import flat_alike
from sophia.optim.rounding import step_key

# Elements that a thread takes at a time: many enough for long streams, few enough that threads end together.
_PIECE = 1 << 20
_LEAST_PIECE = 1 << 13
# Elements below which another thread costs more than it does, as in torch.
_GRAIN = 1 << 15

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def problem() -> str | None:
    """Why these kernels cannot run here, with the remedy; None where they can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is missing: pip install 'sophia-lm[train]' (or numba), or leave fused=None"
    try:
        importlib.import_module("numba")
    except ImportError as error:  # numba refuses versions of numpy that it does not know
        return f"numba cannot be imported ({error}): install versions of numba and numpy that fit, or leave fused=None"
    return None


def sophia_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    *,
    lr: float | Tensor,
    beta1: float,
    gamma: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    kept: dict[str, Any],
    clipped: Tensor | None,
    keys: Sequence[int] | None,
    step: int | Tensor,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
) -> list[int]:
    """One step, in place; `update.sophia` says what the arguments are.

    Returns:
        The indices of the tensors that were left alone, because there is no loop for their dtypes or layouts.
    """
    del kept
    if found_inf is not None and float(found_inf) != 0:
        return []
    rate = float(lr)
    weight = (1.0 - beta1) * sign(maximize, grad_scale)
    constants = [1.0 - rate * weight_decay, rate, beta1, weight, gamma, eps]
    groups, left = by_dtypes(params, grads, exp_avgs, hessians)
    for dtypes, indices in groups.items():
        noisy = keys is not None and dtypes[2] == torch.bfloat16
        columns = [[column[i] for i in indices] for column in (params, grads, exp_avgs, hessians)]
        run("cpu_loops.step_loop", (*dtypes, noisy), columns, words(keys, indices, step, noisy), constants, clipped)
    return left


def fold_(
    hessians: list[Tensor],
    estimates: list[Tensor],
    *,
    beta2: float,
    scale: float,
    kept: dict[str, Any],
    keys: Sequence[int] | None,
    step: int | Tensor,
) -> list[int]:
    """h ← β2 h + (1 − β2) · scale · ĥ, in place. Returns the indices of the tensors that there is no loop for."""
    del kept
    groups, left = by_dtypes(hessians, estimates)
    for dtypes, indices in groups.items():
        noisy = keys is not None and dtypes[0] == torch.bfloat16
        columns = [[column[i] for i in indices] for column in (hessians, estimates)]
        run(
            "cpu_loops.fold_loop",
            (*dtypes, noisy),
            columns,
            words(keys, indices, step, noisy),
            [beta2, (1.0 - beta2) * scale],
            None,
        )
    return left


def floor_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    *,
    piece: int | None = None,
    prefetched: bool = False,
) -> None:
    """The memory traffic of an fp32 step with next to no arithmetic, to measure the step against; θ and m change."""
    columns = [params, grads, exp_avgs, hessians]
    run("cpu_loops.floor_loop", (prefetched,), columns, [0] * len(params), [0.0], None, piece)


def sign(maximize: bool, grad_scale: Tensor | None) -> float:
    """What a stored gradient is multiplied by."""
    return (-1.0 if maximize else 1.0) / (1.0 if grad_scale is None else float(grad_scale))


def by_dtypes(*columns: list[Tensor]) -> tuple[dict[tuple[torch.dtype, ...], list[int]], list[int]]:
    """The indices of tensors that a loop of certain dtypes can take, and of those that none can."""
    groups: dict[tuple[torch.dtype, ...], list[int]] = {}
    left: list[int] = []
    for index, arrays in enumerate(zip(*columns, strict=True)):
        dtypes = tuple([array.dtype for array in arrays])
        if not flat_alike(arrays) or not all(dtype in _DTYPES for dtype in dtypes):
            left.append(index)
        else:
            groups.setdefault(dtypes, []).append(index)
    return groups, left


def words(keys: Sequence[int] | None, indices: list[int], step: int | Tensor, noisy: bool) -> list[int]:
    """The rounding key of each tensor at t."""
    if keys is None or not noisy:
        return [0] * len(indices)
    return [int(step_key(keys[i], step)) for i in indices]


def run(
    name: str,
    variant: tuple[Any, ...],
    columns: Sequence[Sequence[Tensor]],
    keys: Sequence[int],
    constants: Sequence[float],
    count: Tensor | None = None,
    piece: int | None = None,
) -> None:
    """Run a loop over lists of tensors: element i of each is one row, as long as that of the first list.

    Args:
        name: of the loop, "module.function".
        variant: what it is compiled for.
        columns: the lists.
        keys: a rounding key for each row.
        constants: of the loop.
        count: 0-D int64 to which what it counts is added.
        piece: elements that a thread takes at a time.
    """
    table: list[int] = []
    total = 0
    for key, *arrays in zip(keys, *columns, strict=True):
        table += (total, key, *(array.data_ptr() for array in arrays))
        total += arrays[0].numel()
    if total == 0:
        return
    table += (total, *[0] * (1 + len(columns)))
    threads = max(1, min(torch.get_num_threads(), total // _GRAIN))
    if piece is None:
        piece = max(_LEAST_PIECE, min(_PIECE, total // (8 * threads)))
    # Tensors, and not numpy's arrays, only because numpy may be missing where this file is imported.
    rows = torch.tensor(table, dtype=torch.int64)
    numbers = torch.tensor(constants, dtype=torch.float64)
    counted = torch.zeros((), dtype=torch.int64) if count is None else count
    addresses = rows.data_ptr(), numbers.data_ptr(), counted.data_ptr()
    work = torch.tensor([0, piece, total, len(keys), *addresses], dtype=torch.int64)
    team.run(_loop(name, variant), work.data_ptr(), threads)


@functools.cache
def _loop(name: str, variant: tuple[Any, ...]) -> int:
    """The address of a loop, compiled when first asked for."""
    module, _, function = name.partition(".")
    loops = importlib.import_module(f"sophia.optim.kernels.{module}")
    address: int = getattr(loops, function)(*variant).address
    return address
