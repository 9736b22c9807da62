"""Logits of a curvature estimate that are never there as a whole.

For 8 sequences of 1024 tokens and 50 304 vocabulary entries the logits alone take 1.6 GB in fp32, and the noise that is
sent back through them as much again. Both are functions of what the model's last layer reads, so a model can hand that
over instead: :data:`deferred_logits`.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sophia.optim.curvature.likelihood import blocks, output_noise
from sophia.optim.gradients import graph_nodes
from sophia.optim.products import add_product_, linear_dtype

# Logits that exist at one time. Larger blocks read the weight less often.
_BLOCK = 1 << 24
_ACCELERATOR_BLOCK = 1 << 26


@dataclass(frozen=True, kw_only=True)
class NoiseRequest:
    """What the backward pass of deferred logits needs to know, see `likelihood.output_noise`."""

    mask: Tensor | None
    """Bool [rows, positions], or None where all count."""
    keys: Tensor
    """Int64 [rows], on the hidden states' device."""
    kind: str
    """One of likelihood.NOISES."""
    vocab_size: int
    """Real entries of the vocabulary."""
    scale: float
    """Factor on the noise."""
    silent: bool
    """Whether no prediction counts: nothing is computed then, and all gradients are zero."""


@dataclass(kw_only=True)
class Head:
    """The last layer of a forward pass whose logits are deferred."""

    shape: torch.Size
    """Of the hidden states, [..., width]."""
    classes: int
    """Rows of the weight."""
    vocab_size: int
    """Those of them that are real."""
    dtype: torch.dtype
    """What the layer computes in: autocast's where that is on."""
    request: NoiseRequest | None = None
    """Set before the backward pass."""


class _Readout:
    """The one instance is `deferred_logits`, whose text this is.

    A readout in place of a model's last layer, with which curvature costs no memory for logits.

    A model that can be asked for something else than logits calls it inside its forward and returns what it gives: a
    scalar that stands for the logits. `refresh_curvature` takes that scalar in place of logits; only in its backward
    pass are they computed, some positions at a time, and forgotten. The estimate is the same. The call belongs inside
    the module that DDP or FSDP2 wraps, where the weight is gathered and gradients are reduced.

    Args:
        hidden: what the last layer reads, [..., width]; the first dimension is the batch.
        weight: its matrix, [rows, width]; logits are hidden @ weight.T.
        vocab_size: the rows that are real; padding beyond gets no probability and no gradient. None is all.

    Returns:
        A scalar, to be handed to `refresh_curvature`. It is no loss: its own value is 0.

    Raises:
        ValueError: the shapes do not fit each other.

    Example:
        >>> class Model(nn.Module):
        ...     def forward(self, tokens, readout=None):
        ...         hidden = self.body(tokens)
        ...         if readout is not None:
        ...             return readout(hidden, self.head.weight)
        ...         return self.head(hidden)
        >>> optimizer.refresh_curvature(lambda: model(tokens, readout=sophia.curvature.deferred_logits))
    """

    _known_to_compiler = False

    def __call__(self, hidden: Tensor, weight: Tensor, vocab_size: int | None = None) -> Tensor:
        return _remember(hidden, weight, vocab_size)

    def __reduce__(self) -> str:
        return "deferred_logits"  # copies and pickles are the one that there is

    def keep_from_compiler(self) -> None:
        """Have compiled models call the readout eagerly; to be called before they do."""
        # Only where the compiler is loaded: without it none can be compiled, and loading it takes seconds.
        if "torch._dynamo" in sys.modules and not self._known_to_compiler:
            # The class's: a call through an attribute would be a frame of its own, which the compiler looks into.
            _Readout.__call__ = torch.compiler.disable(  # type: ignore[method-assign, no-untyped-call]
                _Readout.__call__,
                reason="deferred_logits runs eagerly: with fullgraph=True hand plain logits to refresh_curvature()",
            )
            _Readout._known_to_compiler = True


def deferred_head(output: Tensor) -> Head | None:
    """The head behind the scalar that a forward returned; None where it is another scalar."""
    for node in graph_nodes(output):  # an engine or a cast may have put operations of its own behind ours
        head = getattr(node, "deferred_head", None)
        if isinstance(head, Head):
            return head
    return None


def _remember(hidden: Tensor, weight: Tensor, vocab_size: int | None) -> Tensor:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"deferred_logits got hidden states of shape {tuple(hidden.shape)} and a weight of shape "
            f"{tuple(weight.shape)}: they must be [..., width] and [vocabulary, width]"
        )
    if vocab_size is not None and not 2 <= vocab_size <= len(weight):
        raise ValueError(f"deferred_logits got vocab_size {vocab_size} for a weight of {len(weight)} rows")
    anchor: Tensor = _Deferred.apply(hidden, weight, vocab_size)  # type: ignore[no-untyped-call]
    return anchor


class _Deferred(torch.autograd.Function):
    """Nothing forward; backward, block by block, logits, their noise, and the gradients of both inputs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, vocab_size: int | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        dtype = linear_dtype(hidden, weight)
        rows = len(weight)
        ctx.deferred_head = Head(shape=hidden.shape, classes=rows, vocab_size=vocab_size or rows, dtype=dtype)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        hidden, weight = ctx.saved_tensors
        head: Head = ctx.deferred_head
        if head.request is None:
            raise RuntimeError(
                "deferred_logits is no loss: hand what it returned to refresh_curvature(), or use a readout that "
                "computes the loss"
            )
        with torch.autocast(hidden.device.type, enabled=False):
            if head.request.silent:
                return torch.zeros_like(hidden), torch.zeros_like(weight), None
            grad_hidden, grad_weight = _gradients(hidden, weight, head, head.request)
            # The chain rule, should something behind the readout have put a factor on the scalar.
            return grad_hidden.mul_(grad), grad_weight.mul_(grad), None


def _gradients(hidden: Tensor, weight: Tensor, head: Head, request: NoiseRequest) -> tuple[Tensor, Tensor]:
    rows, vocab = len(request.keys), request.vocab_size
    inputs = hidden.reshape(rows, -1, hidden.shape[-1])
    grad_hidden = torch.empty_like(inputs)
    # Sums over blocks in fp32 at least.
    grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    real, sums = weight[:vocab].to(head.dtype), grad_weight[:vocab]
    size = _BLOCK if hidden.device.type == "cpu" else _ACCELERATOR_BLOCK
    for row, position in blocks(rows, inputs.shape[1], vocab, size):
        part = inputs[row, position].to(head.dtype)  # [rows, positions, width]
        logits = part @ real.T
        noise = output_noise(
            logits,
            None if request.mask is None else request.mask[row, position],
            request.keys[row],
            likelihood="categorical",
            kind=request.kind,
            vocab_size=None,
            out=logits,
            start=position.start,
        )
        if request.scale != 1:
            noise.mul_(request.scale)
        grad_hidden[row, position] = noise @ real
        add_product_(sums, noise.flatten(0, 1).T, part.flatten(0, 1))
    return grad_hidden.view_as(hidden), grad_weight.to(weight.dtype)


deferred_logits = _Readout()
