"""Floating-point operations of a piece of training, counted where it runs.

torch's counter sees every product of the forward and backward passes, of curvature estimates and of an optimizer's own
work. What it does not know is added here; attention counts as in `sophia.accounting` (every position sees all others,
the backward pass is twice the forward, what a fused kernel computes again does not count), so that plain training steps
come out as `flops_per_token` has them. Element-wise work does not count. Of compiled code the counter sees nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten


def count(run: Callable[[], object]) -> int:
    """Operations of a call, a multiplication with an addition being two."""
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with counter:
        run()
    return int(counter.get_total_flops())


def _attention(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products, [batch, heads, time, width]: scores, and their mean of the values."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def _attention_backward(_: Any, query: Sequence[int], key: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * _attention(query, key)


def _product(_: Any, left: Sequence[int], right: Sequence[int], **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _batched_product(_: Any, left: Sequence[int], right: Sequence[int], **__: Any) -> int:
    return 2 * left[0] * left[1] * left[2] * right[2]


def _qr(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    """R by Householder's reflections and Q written out, n × n: 4/3 n³ each (Golub and Van Loan, section 5.2)."""
    *batch, rows, columns = matrix
    return int(torch.Size(batch).numel() * 8 * rows * columns * min(rows, columns) // 3)


def _eigh(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    """Eigenvalues and vectors of a symmetric matrix, about 9 n³ (Golub and Van Loan, section 8.3)."""
    *batch, rows, _columns = matrix
    return int(torch.Size(batch).numel() * 9 * rows**3)


_FORWARD = ("flash", "efficient", "cudnn")
_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten.addmm_: _product,
    _aten.baddbmm_: _batched_product,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    **{getattr(_aten, f"_scaled_dot_product_{kind}_attention"): _attention for kind in _FORWARD},
    **{getattr(_aten, f"_scaled_dot_product_{kind}_attention_backward"): _attention_backward for kind in _FORWARD},
    _aten.linalg_qr: _qr,
    _aten._linalg_eigh: _eigh,
}
