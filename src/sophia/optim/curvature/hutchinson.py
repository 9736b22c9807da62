"""Hutchinson's estimator (paper, section 2.3 and algorithm 1)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sophia.optim import fsdp, noise
from sophia.optim.curvature.estimator import Forward, Refresh, without_autocast
from sophia.optim.dtensor import local, shard
from sophia.optim.gradients import graph_nodes, isolated_gradients

_NOISES = ("gaussian", "rademacher")
_PRODUCTS = ("auto", "double_backward", "finite_difference")
# How torch says that an operation of the model has no second derivative.
_NO_SECOND_DERIVATIVE = ("double backward", "is not implemented", "once_differentiable")
# Operations that refuse even the first pass, each in words of its own, when a second one is to follow.
_PLAIN_ONLY = {"CheckpointFunction": "reentrant activation checkpoints", "CompiledFunction": "compiled models"}
_LOSS_SCALE = 2.0**10  # on a mean loss; with Refresh.scale on top
# Central differences err by O(δ²) from the third derivative and by O(ε/δ) from rounding: the cube root of the machine
# epsilon (2^-8), a little less by measurement, balances them, relative to the size of a typical parameter.
_RELATIVE_STEP = 2.0**-9


class _NoSecondDerivative(RuntimeError):
    pass


@dataclass(frozen=True, kw_only=True)
class Hutchinson:
    """u ⊙ (H u) for a random u: unbiased for the diagonal of the Hessian H of the mean loss. Entries may be negative.

    u is one vector for all replicas and all forwards of a refresh; gradients are averaged over both.
    """

    noise: Literal["gaussian", "rademacher"] = "gaussian"
    """Law of u: standard normal as in the paper, or random signs, which have less variance."""
    product: Literal["auto", "double_backward", "finite_difference"] = "auto"
    """How H u is computed. "double_backward" is exact; attention runs in its "math" form, as the fast kernels have no
    second derivative. "finite_difference" takes two gradients at θ ± δu in fp32 with autocast off and restores the
    parameters bit for bit; it works with any kernel and in compiled models, and is the only form under DDP and FSDP2,
    whose hooks see plain backward passes only. "auto" is the first where it works, else the second."""

    def __post_init__(self) -> None:
        """Refuse unknown settings."""
        if self.noise not in _NOISES:
            raise ValueError(f"noise={self.noise!r} is not one of {', '.join(_NOISES)}")
        if self.product not in _PRODUCTS:
            raise ValueError(f"product={self.product!r} is not one of {', '.join(_PRODUCTS)}")

    def estimate(self, forwards: Sequence[Forward], params: Sequence[Tensor], refresh: Refresh) -> list[Tensor | None]:
        """The estimate u ⊙ H u, one fp32 tensor or None a parameter.

        Args:
            forwards: each returns the scalar mean loss of one micro-batch, or an object that holds it as `.loss`;
                several count equally.
            params: the parameters, in the order of the result.
            refresh: seed, step and replicas.

        Raises:
            ValueError: on all ranks, when a forward does not return a scalar loss with a gradient.
        """
        if refresh.rows is not None:
            raise ValueError("rows has no meaning for Hutchinson, whose noise belongs to parameters: leave it out")
        wanted = [index for index, p in enumerate(params) if p.requires_grad]
        theta = [params[index] for index in wanted]
        u = [self._noise(params[index], index, refresh) for index in wanted]
        hu = self._hessian_product(forwards, theta, u, refresh)
        estimates: list[Tensor | None] = [None] * len(params)
        for index, direction, product in zip(wanted, u, hu, strict=True):
            if product is not None:
                estimates[index] = product.mul_(direction)
        return estimates

    def sums(
        self, forwards: Sequence[Forward], params: Sequence[Tensor], refresh: Refresh
    ) -> tuple[list[Tensor | None], float]:
        """:meth:`estimate`, and the factor 1."""
        return self.estimate(forwards, params, refresh), 1.0

    def _noise(self, param: Tensor, index: int, refresh: Refresh) -> Tensor:
        """This rank's part of the global noise of one parameter, in at least fp32."""
        key = noise.stream_key(refresh.seed, refresh.step, index)
        u = noise.filled(param.shape, key, self.noise, local(param).device)
        u = u.to(torch.promote_types(u.dtype, param.dtype))
        return shard(u, param)

    def _hessian_product(
        self, forwards: Sequence[Forward], theta: list[Tensor], u: list[Tensor], refresh: Refresh
    ) -> list[Tensor | None]:
        if refresh.replicas.has_engine:
            if self.product == "double_backward":
                raise ValueError(
                    'product="double_backward" cannot run under torch.distributed, whose engines reduce gradients in '
                    'plain backward passes only: use "finite_difference" or "auto"'
                )
        elif self.product != "finite_difference":
            try:
                return _double_backward(forwards, theta, u, refresh)
            except _NoSecondDerivative as problem:
                if self.product == "double_backward":
                    raise RuntimeError(
                        f'the model has no second derivative ({problem}): use product="finite_difference" or "auto"'
                    ) from problem
        return _finite_difference(forwards, theta, u, refresh)


def _double_backward(
    forwards: Sequence[Forward], theta: list[Tensor], u: list[Tensor], refresh: Refresh
) -> list[Tensor | None]:
    scale = _LOSS_SCALE * refresh.scale
    sums: list[Tensor | None] = [None] * len(theta)
    for index, forward in enumerate(forwards):
        with sdpa_kernel(SDPBackend.MATH):
            loss = _loss(forward, index, theta, refresh)
        for place, product in enumerate(_product_of_one(loss, theta, u, scale)):
            known = sums[place]
            if product is not None:
                sums[place] = product if known is None else known.add_(product)
    count = scale * len(forwards)
    if refresh.replicas.reduction == "none":
        sums = refresh.replicas.sum_gradients(sums, theta)
        count *= refresh.replicas.size
    return [None if s is None else s.div_(count) for s in sums]


def _product_of_one(loss: Tensor, theta: list[Tensor], u: list[Tensor], scale: float) -> list[Tensor | None]:
    """scale · H u of one loss; None for parameters that the loss does not use."""
    for node in graph_nodes(loss):
        for kind, what in _PLAIN_ONLY.items():
            if kind in node.name():
                raise _NoSecondDerivative(f"{what} run in plain backward passes only")
    with torch.enable_grad(), without_autocast(loss.device):
        # A factor that requires a gradient: so every operation's backward is told that a second one will follow, and
        # those that cannot have one (once_differentiable) say so instead of silently counting as linear.
        factor = torch.full_like(loss, scale, requires_grad=True)
        try:
            # autograd.grad and locals: `.backward(create_graph=True)` would tie every parameter into a cycle with its
            # own gradient, and leak.
            grads = torch.autograd.grad(loss * factor, theta, create_graph=True, allow_unused=True)
            dots = [(g.to(d.dtype) * d).sum().to(loss.device) for g, d in zip(grads, u, strict=True) if g is not None]
            if not dots:
                return [None] * len(theta)
            slope = torch.stack(dots).sum()
            with isolated_gradients(theta, slope):
                # A whole backward pass: `autograd.grad` would go around operations that only raise when they are run.
                torch.autograd.backward(slope)
                products = [p.grad for p in theta]
        except RuntimeError as problem:
            if any(sign in str(problem) for sign in _NO_SECOND_DERIVATIVE):
                raise _NoSecondDerivative(str(problem).splitlines()[0]) from problem
            raise
    return [
        None if g is None else torch.zeros_like(d) if product is None else product.to(d.dtype)
        for g, d, product in zip(grads, u, products, strict=True)
    ]


def _finite_difference(
    forwards: Sequence[Forward], theta: list[Tensor], u: list[Tensor], refresh: Refresh
) -> list[Tensor | None]:
    low = next((p.dtype for p in theta if p.dtype not in (torch.float32, torch.float64)), None)
    if low is not None:
        raise ValueError(
            f"a finite-difference Hessian product needs fp32 parameters, and one is {low}: keep the parameters in fp32 "
            "under autocast, or use SophiaG, whose estimator needs first derivatives only"
        )
    low = fsdp.computed_in(theta)
    if low not in (None, torch.float32, torch.float64):
        raise ValueError(
            f"a finite-difference Hessian product needs fp32, and FSDP2 gathers the parameters in {low}: leave "
            "param_dtype out of its MixedPrecisionPolicy (under autocast the model is as fast), or use SophiaG"
        )
    # `.data`: the perturbation is undone bit for bit, so a graph that the caller still holds stays valid.
    parts = [local(p).data for p in theta]
    kept = [part.clone() for part in parts]
    step = _RELATIVE_STEP * _root_mean_square(theta, refresh)
    try:
        _perturb(parts, kept, u, step)
        above = _mean_gradients(forwards, theta, refresh)
        _perturb(parts, kept, u, -step)
        below = _mean_gradients(forwards, theta, refresh)
    finally:
        for part, original in zip(parts, kept, strict=True):
            part.copy_(original)
    return [None if a is None or b is None else a.sub_(b).div_(2 * step) for a, b in zip(above, below, strict=True)]


def _perturb(parts: list[Tensor], kept: list[Tensor], u: list[Tensor], step: float) -> None:
    for part, original, direction in zip(parts, kept, u, strict=True):
        torch.add(original, direction, alpha=step, out=part)


def _mean_gradients(forwards: Sequence[Forward], theta: list[Tensor], refresh: Refresh) -> list[Tensor | None]:
    """The gradient of the loss's mean over forwards and ranks."""
    sums: list[Tensor | None] = [None] * len(theta)
    for index, forward in enumerate(forwards):
        loss = _loss(forward, index, theta, refresh, full_precision=True)
        with isolated_gradients(theta, loss), without_autocast(loss.device):
            torch.autograd.backward(loss)
            totals = refresh.replicas.sum_gradients([p.grad for p in theta], theta)
        refresh.replicas.check_reduced(totals, theta)
        for place, total in enumerate(totals):
            known = sums[place]
            if total is not None:
                sums[place] = total if known is None else known.add_(total)
    return [None if s is None else s.div_(refresh.replicas.size * len(forwards)) for s in sums]


def _loss(
    forward: Forward, index: int, theta: list[Tensor], refresh: Refresh, *, full_precision: bool = False
) -> Tensor:
    loss, error = None, None
    try:
        with refresh.forward_pass(index, theta, full_precision=full_precision):
            loss = _read(forward())
            if full_precision:
                _check_precision(loss)
    except Exception as problem:  # whatever it is, the other ranks must hear of it
        error = problem
    refresh.replicas.agree(error, [], theta[0].device)
    assert loss is not None
    return loss


def _check_precision(loss: Tensor) -> None:
    """Refuse a loss computed in low precision: the difference of two gradients would be rounding."""
    for node in graph_nodes(loss):
        for parent, _ in node.next_functions:
            # A cast that parameters go through on their way in: an autocast region makes one.
            if parent is not None and hasattr(parent, "variable") and node.name().startswith("ToCopyBackward"):
                dtype = node._input_metadata[0].dtype
                if dtype in (torch.bfloat16, torch.float16):
                    raise ValueError(
                        f"forward() opens an autocast region of {dtype} of its own, in which a finite-difference "
                        "Hessian product would be rounding: open the region around refresh_curvature() instead (it is "
                        "then left for the product), or use SophiaG"
                    )


def _read(output: Any) -> Tensor:
    loss = getattr(output, "loss", output)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"forward() returned {type(output).__name__} without a loss, but Hutchinson needs the scalar mean loss: "
            "return for example F.cross_entropy(logits, targets)"
        )
    if loss.dim() != 0:
        raise ValueError(
            f"forward() returned a tensor of shape {tuple(loss.shape)}, but Hutchinson needs the scalar mean loss: "
            "return for example F.cross_entropy(logits, targets) (SophiaG is the one that takes logits)"
        )
    if not loss.requires_grad:
        raise ValueError(
            "the loss that forward() returned carries no gradient: compute it with the trainable model, without "
            "torch.no_grad(), inference_mode() or detach()"
        )
    return loss


def _root_mean_square(theta: list[Tensor], refresh: Refresh) -> float:
    totals = torch.zeros(2, dtype=torch.float64, device=local(theta[0]).device)
    for p in theta:
        part = local(p.detach())
        weight = refresh.replicas.shard_weight(p)
        totals[0] += torch.linalg.vector_norm(part, dtype=torch.float64).square() * weight
        totals[1] += part.numel() * weight
    square, count = refresh.replicas.sum_shards(totals).tolist()
    return max(math.sqrt(square / max(count, 1.0)), 1e-3)
