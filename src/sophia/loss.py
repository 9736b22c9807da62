"""Cross-entropy of hidden states, chunk by chunk: the logits of all predictions never exist at the same time.

The plain loss keeps four numbers for each prediction and row of the head: the logit, its log-softmax, and the gradients
of both. For 8 x 1024 predictions of a vocabulary of 50304 that is 6 GiB, more than the rest of GPT-2 small takes.
Here a chunk's logits become probabilities and then their own gradient, all in one buffer, from which the two gradients
of the head's product follow at once: the hidden states' and the weight's, for an incoming gradient of 1, by which the
backward pass has only to multiply. The arithmetic is that of the plain loss, three products as large as the head's.

Why not `torch.nn.functional.linear_cross_entropy` with its options for chunks, which does the same: under autocast it
adds up the chunks' weight gradients in bf16, on the CPU it then multiplies in fp32, and its default chunks
are several times slower there than those chosen here (docs/performance.md has the figures).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sophia.optim.products import add_product_, linear_dtype, product

IGNORED = -100
"""A target that does not count."""

# Predictions in a chunk. Each chunk reads and writes the weight's gradient once, so a few hundred are needed to keep
# the processor multiplying; with 512 the logits take less room than that gradient where the model is wider than 512.
_CPU_ROWS = 512
# GPUs multiply so fast that the same wants more of them; 2^27 logits are 512 MiB in fp32.
_GPU_ENTRIES = 1 << 27


@dataclass(frozen=True, eq=False)
class CrossEntropy:
    """A readout of :class:`sophia.model.GPT`: the summed loss of next-token predictions.

    Example:
        >>> loss = model(inputs, CrossEntropy(targets)) / targets.numel()
        >>> loss.backward()
    """

    targets: Tensor
    """The true ids, [batch, time]; -100 where a prediction does not count."""
    compiled: bool = False
    """Whether to compile what happens to a chunk's logits: two passes over them are left, and in bf16 no copy in fp32.
    For compiled models on GPUs, which multiply so fast that those passes count."""

    def __call__(self, hidden: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
        """Sum the loss: hidden [batch, time, width], weight [rows, width] -> scalar, in fp32 at least."""
        flat = hidden.flatten(0, -2)
        return summed_cross_entropy(flat, weight, self.targets.flatten(), vocab_size, compiled=self.compiled)


def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, compiled: bool = False
) -> Tensor:
    """The sum of the cross-entropies of ``hidden @ weight[:vocab_size].T``.

    Under autocast the products are in its dtype, all else in fp32. It can be differentiated once.

    Args:
        hidden: [predictions, width].
        weight: [rows, width] with at least vocab_size rows; those beyond have probability and gradient zero.
        targets: The true ids, [predictions]; -100 where a prediction does not count.
        vocab_size: Number of ids.
        compiled: Compile what happens to a chunk's logits.

    Returns:
        A scalar in nats, in fp32 (fp64 for hidden states in fp64).
    """
    shape = _Shape(vocab_size=vocab_size, dtype=linear_dtype(hidden, weight), compiled=compiled)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total: Tensor = _Summed.apply(hidden, weight, targets, shape)  # type: ignore[no-untyped-call]
        return total
    with torch.no_grad():
        return _pass(hidden, weight, targets, shape, wants=(False, False))[0]


def chunk_rows(rows: int, device: str) -> int:
    """Predictions whose logits exist at the same time, for a head with so many rows."""
    return _CPU_ROWS if device == "cpu" else max(_CPU_ROWS, 1 << (_GPU_ENTRIES // rows).bit_length() - 1)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """Of the computation."""

    vocab_size: int
    """Number of ids."""
    dtype: torch.dtype
    """Of the products."""
    compiled: bool
    """Whether what happens to a chunk's logits is compiled."""


class _Summed(torch.autograd.Function):
    """The loss with its gradients, which are computed on the way."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, shape: _Shape) -> Tensor:
        total, *gradients = _pass(hidden, weight, targets, shape, wants=ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # In place: torch raises, should a second backward pass ask for them again.
        scaled = [None if saved is None else saved.mul_(gradient) for saved in ctx.saved_tensors]
        return *scaled, None, None


def _pass(
    hidden: Tensor, weight: Tensor, targets: Tensor, shape: _Shape, *, wants: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """All chunks: the summed loss, and its gradients to hidden states and weight, where they are wanted."""
    full = torch.promote_types(hidden.dtype, torch.float32)
    low = weight.to(shape.dtype)  # [rows, width]
    losses = torch.empty(targets.shape, dtype=full, device=hidden.device)
    to_hidden = torch.empty_like(hidden) if wants[0] else None
    to_weight = weight.new_empty(weight.shape, dtype=full) if wants[1] else None
    size = chunk_rows(len(weight), hidden.device.type)
    buffer = _buffer(min(size, len(hidden)), len(weight), hidden, shape.dtype if shape.compiled else full, shape.dtype)
    act = _compiled_act() if shape.compiled else _loss_and_gradient_
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            read = hidden[part].to(shape.dtype)  # [chunk, width]
            logits = product(read, low.t(), buffer[: len(read)])
            losses[part] = act(logits, targets[part], shape.vocab_size, any(wants))
            # Dropped before the next chunk's product needs the room.
            gradient = logits.to(shape.dtype)
            if to_hidden is not None:
                to_hidden[part] = gradient @ low
            if to_weight is not None:
                add_product_(to_weight, gradient.t(), read, first=start == 0)
            del gradient
    return losses.sum(), to_hidden, None if to_weight is None else to_weight.to(weight.dtype)


def _loss_and_gradient_(logits: Tensor, targets: Tensor, vocab_size: int, differentiate: bool) -> Tensor:
    """The loss of each row, [chunk]; leaves the loss's gradient in the place of its logits, [chunk, rows]."""
    counts = targets != IGNORED
    index = torch.where(counts, targets, 0)[:, None]
    logits[:, vocab_size:] = -torch.inf
    largest = logits.amax(1, keepdim=True)
    chosen = logits.gather(1, index).sub_(largest)
    weights = logits.sub_(largest).exp_()
    total = weights.sum(1, keepdim=True)
    losses = (total.log() - chosen).squeeze(1).masked_fill_(~counts, 0)
    if differentiate:
        ones = counts[:, None].to(logits.dtype)
        logits.mul_(ones / total).scatter_add_(1, index, -ones)
    return losses


def _fusible_loss_and_gradient_(logits: Tensor, targets: Tensor, vocab_size: int, differentiate: bool) -> Tensor:
    """The same in a form that compiles to two loops; the logits may be in bf16."""
    full = torch.promote_types(logits.dtype, torch.float32)
    counts = targets != IGNORED
    index = torch.where(counts, targets, 0)[:, None]
    ids = torch.arange(logits.shape[1], device=logits.device)
    real = torch.where(ids < vocab_size, logits.to(full), -torch.inf)
    largest = real.amax(1, keepdim=True)
    weights = (real - largest).exp()
    total = weights.sum(1, keepdim=True)
    chosen = logits.gather(1, index).to(full) - largest
    losses = (total.log() - chosen).squeeze(1).masked_fill(~counts, 0)
    if differentiate:
        logits.copy_((weights / total - (ids == index).to(full)) * counts[:, None])
    return losses


@functools.cache
def _compiled_act() -> Callable[[Tensor, Tensor, int, bool], Tensor]:
    return torch.compile(_fusible_loss_and_gradient_, dynamic=False)


def _buffer(chunk: int, rows: int, hidden: Tensor, dtype: torch.dtype, factors: torch.dtype) -> Tensor:
    """Room for a chunk's logits, [chunk, rows]. On the CPU columns are contiguous, which its product is faster with."""
    if hidden.device.type == "cpu" and dtype == factors:
        return hidden.new_empty(rows, chunk, dtype=dtype).t()
    return hidden.new_empty(chunk, rows, dtype=dtype)
