"""The rule: Algorithm 3 of the paper (arXiv 2305.14342) on lists of plain tensors.

One formula, several speeds. All functions change their tensors in place, take no decision about *when*, and compute in
fp32 (fp64 where parameters or state are fp64) whatever the storage dtype: ε = 1e-12 is zero in fp16.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from sophia.optim import kernels, rounding
from sophia.optim.layout import flat_alike

Path: TypeAlias = Literal["sliced", "foreach", "fused"]

# Elements of a slice on the CPU: its p, g, m, h and the scratch stay in the cache from one operation to the next.
# Full-size temporaries instead cost at least twice as much (docs/decisions.md).
BLOCK = 1 << 18
# Elements of a foreach bucket: bounds the temporaries that `_foreach_` operations allocate.
BUCKET = 1 << 26


class Scratch:
    """Persistent slice-sized buffers, so that a step allocates nothing that grows with the model."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, torch.device, torch.Size], Tensor] = {}
        self.kept: dict[str, Any] = {}  # what the fused kernels of a device type keep from one step to the next

    def like(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous buffer of tensor's shape, valid until the next request of the same name."""
        shaped = (name, dtype, tensor.device, tensor.shape)
        view = self._views.get(shaped)  # a model has few shapes, and making a view takes longer than finding one
        if view is not None:
            return view
        key = shaped[:3]
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < tensor.numel():
            buffer = torch.empty(max(tensor.numel(), min(BLOCK, 4096)), dtype=dtype, device=tensor.device)
            self._buffers[key] = buffer
            self._views.clear()  # of the old one, which they would keep alive
        self._views[shaped] = view = buffer[: tensor.numel()].view(tensor.shape)
        return view


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
    path: Path = "sliced",
    scratch: Scratch | None = None,
    clipped: Tensor | None = None,
    keys: Sequence[int] | None = None,
    step: int | Tensor = 0,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """One step of Sophia, in place (Algorithm 3, lines 6 and 11-13).

    m ← β1 m + (1 − β1) g;   θ ← θ − η λ θ;   θ ← θ − η · clip(m / max(γ h, ε), ±1)

    Args:
        params, grads, exp_avgs, hessians: θ, g, m, h, lists of the same length; element i of each has one shape. All
            on one device, for the fused path.
        lr: η, a number or a 0-D tensor on the parameters' device.
        path: "sliced", cache-sized slices; "foreach", few launches over whole tensors; "fused", one pass.
        scratch: buffers to reuse between calls.
        clipped: 0-D int64 on the parameters' device, to which the number of clipped coordinates is added.
        keys: `rounding.tensor_key` of every m, by which bfloat16 momentum is rounded; None rounds it to nearest.
        step: t, for that rounding; a 0-D tensor on the device in CUDA graphs.
        found_inf: 0-D; where it is not 0, nothing is changed.
        grad_scale: 0-D, by which gradients are divided.
    """
    if isinstance(lr, Tensor) and kernels.readable(lr):
        lr = float(lr)
    if found_inf is not None and kernels.readable(found_inf):
        if float(found_inf) != 0:
            return
        found_inf = None
    scratch = scratch or Scratch()
    if path == "fused" and params:
        left = kernels.module(params[0].device.type).sophia_(
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
            kept=scratch.kept,
            clipped=clipped,
            keys=keys,
            step=step,
            found_inf=found_inf,
            grad_scale=grad_scale,
        )
        if not left:
            return
        params, grads, exp_avgs, hessians = (
            [column[index] for index in left] for column in (params, grads, exp_avgs, hessians)
        )
        keys = None if keys is None else [keys[index] for index in left]
        path = "sliced" if params[0].device.type == "cpu" else "foreach"
    if found_inf is not None:
        lr = (found_inf == 0).to(torch.float64) * lr
    if isinstance(lr, Tensor):  # on the device, where it may be zero: slices divide by it
        path = "foreach"
    (_multi_tensor_sophia if path == "foreach" else _single_tensor_sophia)(
        params,
        grads,
        exp_avgs,
        hessians,
        lr=lr,
        beta1=beta1,
        gamma=gamma,
        eps=eps,
        weight_decay=weight_decay,
        scratch=scratch,
        clipped=clipped,
        edge=Edge(maximize=maximize, keys=keys, step=step, found_inf=found_inf, grad_scale=grad_scale),
    )


class Edge:
    """Between what is stored and what the rule computes with: the gradient's sign and scale, the state's rounding."""

    def __init__(
        self,
        *,
        maximize: bool = False,
        keys: Sequence[int] | None = None,
        step: int | Tensor = 0,
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> None:
        self._sign = -1 if maximize else 1
        self._keys = keys
        self._step = step
        self._found_inf = found_inf
        self._grad_scale = grad_scale

    def gradient(self, grad: Tensor, m: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
        """g: the stored gradient unscaled, its sign turned to ascend; m, which m goes nowhere to, if one overflowed."""
        g = _read("work", grad, dtype, scratch)
        if self._grad_scale is not None:
            g = torch.div(g, self._grad_scale, out=scratch.like("work", grad, dtype))
        if self._sign < 0:
            g = torch.neg(g, out=scratch.like("work", grad, dtype))
        return g if self._found_inf is None else torch.where(self._found_inf != 0, m, g)

    def gradients(self, grads: list[Tensor], momenta: list[Tensor]) -> list[Tensor]:
        """:meth:`gradient` of a whole list."""
        if self._grad_scale is not None:
            grads = list(torch._foreach_div(grads, self._grad_scale))
        if self._sign < 0:
            grads = list(torch._foreach_neg(grads))
        if self._found_inf is not None:
            grads = [torch.where(self._found_inf != 0, m, g) for m, g in zip(momenta, grads, strict=True)]
        return grads

    def write_state(self, index: int, stored: Tensor, value: Tensor, origin: int) -> None:
        """Store m or h of tensor `index`, which begins at `origin` of its storage: bfloat16 by stochastic rounding."""
        if stored.dtype == torch.bfloat16 and self._keys is not None:
            rounding.write_(stored, value, rounding.step_key(self._keys[index], self._step), origin=origin)
        else:
            write(stored, value)


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
    scratch: Scratch,
    clipped: Tensor | None,
    edge: Edge,
) -> None:
    """In units of −η: −η clip(m / max(γ h, ε), ±1) is m / min(−γ h / η, −ε / η), clipped to ±η.

    So decay and update of θ are one operation, and a step takes six instead of seven (docs/performance.md).
    """
    assert not isinstance(lr, Tensor)
    eta = lr or 1.0  # where nothing moves, any unit will do to count what would be clipped
    for index, tensors in enumerate(zip(params, grads, exp_avgs, hessians, strict=True)):
        dtype, origin = compute_dtype(*tensors), int(exp_avgs[index].storage_offset())
        for param, grad, exp_avg, hessian in slices(*tensors):
            theta = _read("param", param, dtype, scratch)
            m = _read("exp_avg", exp_avg, dtype, scratch)
            m.lerp_(edge.gradient(grad, m, dtype, scratch), 1 - beta1)

            h = _read("hessian", hessian, dtype, scratch)
            bound = torch.mul(h, -gamma / eta, out=scratch.like("work", param, dtype)).clamp_max_(-eps / eta)
            update = torch.div(m, bound, out=bound)
            if clipped is not None:
                clipped += (update.abs() > eta).sum()
            update.clamp_(-eta, eta)
            if lr:
                torch.add(update, theta, alpha=1 - lr * weight_decay, out=theta)

            write(param, theta)
            edge.write_state(index, exp_avg, m, origin)


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
    scratch: Scratch,
    clipped: Tensor | None,
    edge: Edge,
) -> None:
    # `_foreach_` operations have no out= form: their temporaries are bounded by the bucket.
    for indices in _buckets(params, grads, exp_avgs, hessians):
        bucket = [(params[i], grads[i], exp_avgs[i], hessians[i]) for i in indices]
        dtype = compute_dtype(*(t for tensors in bucket for t in tensors))
        theta, g, m, h = ([t.to(dtype) for t in tensors] for tensors in zip(*bucket, strict=True))
        g = edge.gradients(g, m)

        torch._foreach_lerp_(m, g, 1 - beta1)
        update = torch._foreach_mul(h, gamma)
        torch._foreach_clamp_min_(update, eps)
        if clipped is not None:
            for own_m, bound in zip(m, update, strict=True):
                clipped += (own_m.abs() > bound).sum()
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

        for index, new_param, new_exp_avg in zip(indices, theta, m, strict=True):
            write(params[index], new_param)
            edge.write_state(index, exp_avgs[index], new_exp_avg, int(exp_avgs[index].storage_offset()))


def accumulate_momentum(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    *,
    beta1: float,
    maximize: bool,
    scratch: Scratch,
    keys: Sequence[int] | None = None,
    step: int | Tensor = 0,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """m ← β1 m + (1 − β1) g for parameters that hold still because their curvature is not known yet.

    The arguments are those of :func:`sophia`.
    """
    edge = Edge(maximize=maximize, keys=keys, step=step, found_inf=found_inf, grad_scale=grad_scale)
    for index, tensors in enumerate(zip(exp_avgs, grads, strict=True)):
        dtype, origin = compute_dtype(*tensors), int(exp_avgs[index].storage_offset())
        for exp_avg, grad in slices(*tensors):
            m = _read("exp_avg", exp_avg, dtype, scratch)
            m.lerp_(edge.gradient(grad, m, dtype, scratch), 1 - beta1)
            edge.write_state(index, exp_avg, m, origin)


def fold_curvature(
    hessians: list[Tensor],
    estimates: list[Tensor],
    *,
    beta2: float,
    scale: float = 1.0,
    path: Path = "sliced",
    scratch: Scratch,
    keys: Sequence[int] | None = None,
    step: int | Tensor = 0,
) -> None:
    """h ← β2 h + (1 − β2) · scale · ĥ, in place (Algorithm 3, line 9).

    Args:
        hessians, estimates: h and ĥ, lists of the same length; all on one device, for the fused path.
        scale: 1 / N, where the estimates are sums.
        keys: `rounding.tensor_key` of every h; see :func:`sophia`, as for the others.
    """
    if path == "fused" and hessians:
        left = kernels.module(hessians[0].device.type).fold_(
            hessians, estimates, beta2=beta2, scale=scale, kept=scratch.kept, keys=keys, step=step
        )
        if not left:
            return
        hessians, estimates = ([column[index] for index in left] for column in (hessians, estimates))
        keys = None if keys is None else [keys[index] for index in left]
    edge = Edge(keys=keys, step=step)
    for index, tensors in enumerate(zip(hessians, estimates, strict=True)):
        dtype, origin = compute_dtype(*tensors), int(hessians[index].storage_offset())
        for hessian, estimate in slices(*tensors):
            h = _read("hessian", hessian, dtype, scratch)
            new = _read("work", estimate, dtype, scratch)
            if scale != 1:
                new = torch.mul(new, scale, out=scratch.like("work", estimate, dtype))
            h.lerp_(new, 1 - beta2)
            edge.write_state(index, hessian, h, origin)


def statistics(
    exp_avg: Tensor, hessian: Tensor, *, gamma: float, eps: float, scratch: Scratch, count: bool = True
) -> Tensor:
    """Clipped coordinates (|m| > max(γ h, ε)), all coordinates, Σ m² and Σ h²: fp32 [4], without a host sync.

    Without `count` the first is left out, as 0.
    """
    dtype = compute_dtype(exp_avg, hessian)
    totals = torch.zeros(4, dtype=torch.float32, device=exp_avg.device)
    for m_slice, h_slice in slices(exp_avg, hessian):
        m = _read("exp_avg", m_slice, dtype, scratch)
        h = _read("hessian", h_slice, dtype, scratch)
        if count:
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
    elif flat_alike(tensors):
        flat = [t.as_strided((t.numel(),), (1,)) for t in tensors]
    else:
        dim = max(range(first.dim()), key=first.size)
        middle = first.size(dim) // 2
        yield from slices(*(t.narrow(dim, 0, middle) for t in tensors))
        yield from slices(*(t.narrow(dim, middle, first.size(dim) - middle) for t in tensors))
        return
    yield from zip(*(torch.split(t, BLOCK) for t in flat), strict=True)


def _read(name: str, tensor: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """The tensor itself where it has the dtype of the arithmetic, else a copy in the scratch buffer `name`."""
    return tensor if tensor.dtype == dtype else scratch.like(name, tensor, dtype).copy_(tensor)


def write(tensor: Tensor, value: Tensor) -> None:
    """Store what was computed, unless it was computed in place."""
    if value is not tensor:
        tensor.copy_(value)


def _buckets(*lists: list[Tensor]) -> Iterator[list[int]]:
    """Indices of tensors with equal devices and dtypes, at most BUCKET elements together (or one larger tensor)."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, row in enumerate(zip(*lists, strict=True)):
        if row[0].numel() > 0:
            groups.setdefault((row[0].device, *(t.dtype for t in row)), []).append(index)
    for indices in groups.values():
        bucket: list[int] = []
        size = 0
        for index in indices:
            numel = lists[0][index].numel()
            if bucket and size + numel > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(index)
            size += numel
        yield bucket
