"""The rule: Algorithm 3 of the paper (arXiv 2305.14342) on lists of plain tensors.

One formula, several speeds. All functions change their tensors in place, take no decision about *when*, and compute in
fp32 (fp64 where parameters or state are fp64) whatever the storage dtype: ε = 1e-12 is zero in fp16.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a slice on the CPU: its p, g, m, h and the scratch stay in the cache from one operation to the next.
# Full-size temporaries instead cost at least twice as much (docs/decisions.md).
BLOCK = 1 << 18
# Elements of a foreach bucket: bounds the temporaries that `_foreach_` operations allocate.
BUCKET = 1 << 26


class Scratch:
    """Persistent slice-sized buffers, so that a step allocates nothing that grows with the model."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def like(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous buffer of tensor's shape, valid until the next request of the same name."""
        key = (name, dtype, tensor.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < tensor.numel():
            buffer = torch.empty(max(tensor.numel(), min(BLOCK, 4096)), dtype=dtype, device=tensor.device)
            self._buffers[key] = buffer
        return buffer[: tensor.numel()].view(tensor.shape)


def sophia(
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
    maximize: bool = False,
    foreach: bool = False,
    scratch: Scratch | None = None,
) -> None:
    """One step of Sophia, in place (Algorithm 3, lines 6 and 11-13).

    m ← β1 m + (1 − β1) g;   θ ← θ − η λ θ;   θ ← θ − η · clip(m / max(γ h, ε), ±1)

    Args:
        params, grads, exp_avgs, hessians: θ, g, m, h, lists of the same length; element i of each has one shape.
        lr: η, a number or a 0-D tensor on the parameters' device.
        foreach: few launches over whole tensors instead of cache-sized slices.
        scratch: buffers to reuse between calls.
    """
    update = _multi_tensor_sophia if foreach else _single_tensor_sophia
    if isinstance(lr, Tensor) and lr.device.type == "cpu":
        lr = float(lr)
    update(
        params,
        grads,
        exp_avgs,
        hessians,
        lr=lr,
        beta1=beta1,
        gamma=gamma,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        scratch=scratch or Scratch(),
    )


def _single_tensor_sophia(
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
    scratch: Scratch,
) -> None:
    for tensors in zip(params, grads, exp_avgs, hessians, strict=True):
        dtype = compute_dtype(*tensors)
        for param, grad, exp_avg, hessian in slices(*tensors):
            theta = _read("param", param, dtype, scratch)
            m = _read("exp_avg", exp_avg, dtype, scratch)
            g = _read("work", grad, dtype, scratch)
            work = scratch.like("work", param, dtype)
            if maximize:
                g = torch.neg(g, out=work)

            m.lerp_(g, 1 - beta1)
            h = _read("hessian", hessian, dtype, scratch)
            update = torch.mul(h, gamma, out=work).clamp_min_(eps)
            torch.div(m, update, out=update).clamp_(-1, 1)
            if weight_decay != 0:
                theta.mul_(1 - lr * weight_decay)
            _subtract(theta, update, lr)

            _write(param, theta)
            _write(exp_avg, m)


def _multi_tensor_sophia(
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
    scratch: Scratch,
) -> None:
    del scratch  # `_foreach_` operations have no out= form: their temporaries are bounded by the bucket instead
    for bucket in _buckets(params, grads, exp_avgs, hessians):
        dtype = compute_dtype(*(t for tensors in bucket for t in tensors))
        theta, g, m, h = ([t.to(dtype) for t in tensors] for tensors in zip(*bucket, strict=True))
        if maximize:
            g = list(torch._foreach_neg(g))

        torch._foreach_lerp_(m, g, 1 - beta1)
        update = torch._foreach_mul(h, gamma)
        torch._foreach_clamp_min_(update, eps)
        update = torch._foreach_div(m, update)
        torch._foreach_clamp_min_(update, -1)
        torch._foreach_clamp_max_(update, 1)
        if weight_decay != 0:
            torch._foreach_mul_(theta, 1 - lr * weight_decay)
        if isinstance(lr, Tensor):
            torch._foreach_mul_(update, lr)
            torch._foreach_sub_(theta, update)
        else:
            torch._foreach_add_(theta, update, alpha=-lr)

        for (param, _, exp_avg, _), new_param, new_exp_avg in zip(bucket, theta, m, strict=True):
            _write(param, new_param)
            _write(exp_avg, new_exp_avg)


def accumulate_momentum(
    grads: list[Tensor], exp_avgs: list[Tensor], *, beta1: float, maximize: bool, scratch: Scratch
) -> None:
    """m ← β1 m + (1 − β1) g for parameters that hold still because their curvature is not known yet."""
    for tensors in zip(exp_avgs, grads, strict=True):
        dtype = compute_dtype(*tensors)
        for exp_avg, grad in slices(*tensors):
            m = _read("exp_avg", exp_avg, dtype, scratch)
            g = _read("work", grad, dtype, scratch)
            if maximize:
                g = torch.neg(g, out=scratch.like("work", grad, dtype))
            m.lerp_(g, 1 - beta1)
            _write(exp_avg, m)


def fold_curvature(hessians: list[Tensor], estimates: list[Tensor], *, beta2: float, scratch: Scratch) -> None:
    """h ← β2 h + (1 − β2) ĥ, in place (Algorithm 3, line 9)."""
    for tensors in zip(hessians, estimates, strict=True):
        dtype = compute_dtype(*tensors)
        for hessian, estimate in slices(*tensors):
            h = _read("hessian", hessian, dtype, scratch)
            h.lerp_(_read("work", estimate, dtype, scratch), 1 - beta2)
            _write(hessian, h)


def statistics(exp_avg: Tensor, hessian: Tensor, *, gamma: float, eps: float, scratch: Scratch) -> Tensor:
    """Clipped coordinates (|m| > max(γ h, ε)), all coordinates, Σ m² and Σ h²: fp32 [4], without a host sync."""
    dtype = compute_dtype(exp_avg, hessian)
    totals = torch.zeros(4, dtype=torch.float32, device=exp_avg.device)
    for m_slice, h_slice in slices(exp_avg, hessian):
        m = _read("exp_avg", m_slice, dtype, scratch)
        h = _read("hessian", h_slice, dtype, scratch)
        bound = torch.mul(h, gamma, out=scratch.like("work", h, dtype)).clamp_min_(eps)
        excess = torch.abs(m, out=scratch.like("param", m, dtype)).sub_(bound)
        totals[0] += (excess > 0).sum()
        totals[1] += m.numel()
        totals[2] += torch.linalg.vector_norm(m).square()
        totals[3] += torch.linalg.vector_norm(h).square()
    return totals


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 where any of the tensors is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of one shape into views of at most BLOCK elements each, the same cut for all.

    Tensors that fill their memory without gaps, in one common order, are cut as flat vectors; others (a transposed
    gradient, a parameter that is a view) along their longest dimension. Off the CPU nothing is gained: one slice.
    """
    first = tensors[0]
    if first.numel() <= BLOCK or first.device.type != "cpu":
        if first.numel() > 0:
            yield tensors
        return
    if all(t.is_contiguous() for t in tensors):
        flat = [t.view(-1) for t in tensors]
    elif all(_dense(t) and t.stride() == first.stride() for t in tensors):
        flat = [t.as_strided((t.numel(),), (1,)) for t in tensors]
    else:
        dim = max(range(first.dim()), key=first.size)
        middle = first.size(dim) // 2
        yield from slices(*(t.narrow(dim, 0, middle) for t in tensors))
        yield from slices(*(t.narrow(dim, middle, first.size(dim) - middle) for t in tensors))
        return
    yield from zip(*(torch.split(t, BLOCK) for t in flat), strict=True)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory exactly once: sorted by stride, each stride is the size below it."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _read(name: str, tensor: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """The tensor itself where it has the dtype of the arithmetic, else a copy in the scratch buffer `name`."""
    return tensor if tensor.dtype == dtype else scratch.like(name, tensor, dtype).copy_(tensor)


def _write(tensor: Tensor, value: Tensor) -> None:
    if value is not tensor:
        tensor.copy_(value)


def _subtract(theta: Tensor, update: Tensor, lr: float | Tensor) -> None:
    if isinstance(lr, Tensor):  # on the device: reading it here would wait for the device
        theta.sub_(update.mul_(lr))
    else:
        theta.add_(update, alpha=-lr)


def _buckets(*lists: list[Tensor]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Rows of the lists with equal devices and dtypes, at most BUCKET elements together (or one larger tensor)."""
    groups: dict[tuple[object, ...], list[tuple[Tensor, ...]]] = {}
    for row in zip(*lists, strict=True):
        if row[0].numel() > 0:
            groups.setdefault((row[0].device, *(t.dtype for t in row)), []).append(row)
    for rows in groups.values():
        bucket: list[tuple[Tensor, ...]] = []
        size = 0
        for row in rows:
            if bucket and size + row[0].numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(row)
            size += row[0].numel()
        yield bucket
