"""The noise that Gauss-Newton-Bartlett pushes into a model's outputs, for each likelihood.

The Gauss-Newton matrix of a loss is Jᵀ S Sᵀ J, where J is the Jacobian of the model's outputs and S Sᵀ the Hessian of
the loss in them. A random vector r with E[r rᵀ] = S Sᵀ, sent through the backward pass in place of the loss's gradient,
gives Jᵀ r, whose square has the diagonal of that matrix as its expectation. Two such vectors:

- "labels": r is the gradient of the loss for a label drawn from the model's own prediction (paper, section 2.3).
- "signs": r = S v with independent random signs v. Same expectation, less variance; needs one bit an output.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sophia.optim import noise

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
NOISES = ("labels", "signs")

# Outputs whose fp32 copies exist at one time. On the CPU the three of them pass from one operation to the next within
# the cache; an accelerator wants few and large operations.
_BLOCK = 1 << 20
_ACCELERATOR_BLOCK = 1 << 25
_COARSE = 256  # probabilities summed into one entry of the coarse table of the inverse CDF
# An integer as wide as a float, and its bits.
_WORDS = {torch.float32: (torch.int32, 32), torch.float64: (torch.int64, 64)}


def output_noise(
    logits: Tensor,
    mask: Tensor | None,
    keys: Tensor,
    *,
    likelihood: str,
    kind: str,
    vocab_size: int | None,
    out: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """The vector r for a batch of outputs, zero where the mask is false.

    Args:
        logits: outputs [rows, positions, vocab] for "categorical", [rows, positions] otherwise.
        mask: bool [rows, positions]; None where all count.
        keys: int64 [rows], one stream of noise a row.
        likelihood: one of LIKELIHOODS.
        kind: one of NOISES.
        vocab_size: the number of real vocabulary entries; those above it get no probability and no gradient.
        out: a tensor of the logits' shape and dtype to write to, for example the logits; None makes one.
        start: the number of the first position within its row.

    Returns:
        A tensor of the logits' shape and dtype.
    """
    result = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    target = result
    if likelihood == "categorical":
        width = logits.shape[-1] if vocab_size is None else vocab_size
        draw = _categorical_label if kind == "labels" else _categorical_sign
        result[..., width:] = 0
        logits, target = logits[..., :width], result[..., :width]
    else:
        width = 1
        draw = {"bernoulli": _bernoulli, "gaussian": _gaussian}[likelihood]
    for row, position in blocks(logits.shape[0], logits.shape[1], width, block_size(logits.device)):
        part = logits[row, position]
        vector = draw(part, keys[row], start + position.start, kind)
        if mask is not None:
            hidden = ~mask[row, position]
            vector.masked_fill_(hidden if vector.dim() == hidden.dim() else hidden.unsqueeze(-1), 0)
        target[row, position] = vector
    return result


def block_size(device: torch.device) -> int:
    """Outputs to turn into noise at one time on a device."""
    return _BLOCK if device.type == "cpu" else _ACCELERATOR_BLOCK


def blocks(rows: int, positions: int, width: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Cut [rows, positions] into blocks of at most `size` outputs, `width` to a position."""
    columns = max(1, min(positions, size // width))
    lines = max(1, size // (columns * width))
    for row in range(0, rows, lines):
        for position in range(0, positions, columns):
            yield slice(row, min(row + lines, rows)), slice(position, min(position + columns, positions))


def _categorical_label(logits: Tensor, keys: Tensor, start: int, kind: str) -> Tensor:
    """softmax(logits) − onehot(ŷ), ŷ ~ softmax(logits). [rows, positions, vocab]."""
    probs = logits.softmax(-1, dtype=_wide(logits))
    uniform = noise.uniform(keys, logits.shape[1], start)
    labels = sample_categorical(probs.flatten(0, 1), uniform.flatten()).view_as(uniform).unsqueeze(-1)
    return probs.scatter_(-1, labels, probs.gather(-1, labels) - 1)


def _categorical_sign(logits: Tensor, keys: Tensor, start: int, kind: str) -> Tensor:
    """S v = √p ⊙ v − p (√p · v), where S = diag(√p) − p √pᵀ. [rows, positions, vocab]."""
    probs = logits.softmax(-1, dtype=_wide(logits))
    rows, positions, vocab = probs.shape
    words = -(-vocab // 64)  # each position owns whole words of random bits
    bits = noise.bits(keys, positions * words, start * words).view(rows, positions, words)
    signed = probs.sqrt().copysign_(_sign_source(bits, probs.dtype)[..., :vocab])
    return torch.addcmul(signed, probs, signed.sum(-1, keepdim=True), value=-1, out=signed)


def _sign_source(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Floats that are positive where a bit is one; nothing but their sign has a meaning.

    Each bit is moved to the sign's place of a float of its own. Counting from each word's lowest bit.

    Args:
        words: int64 [..., n].
        dtype: float32 or float64.

    Returns:
        [..., 64 n].
    """
    integer, size = _WORDS[dtype]
    shifts = torch.arange(size - 1, -1, -1, dtype=integer, device=words.device)
    return ((~words).view(integer).unsqueeze(-1) << shifts).flatten(-2).view(dtype)


def _bernoulli(logits: Tensor, keys: Tensor, start: int, kind: str) -> Tensor:
    """σ(z) − ŷ with ŷ ~ Bernoulli(σ(z)), or √(σ(1 − σ)) v. [rows, positions]."""
    probs = logits.to(_wide(logits)).sigmoid()
    if kind == "labels":
        return probs - (noise.uniform(keys, logits.shape[1], start) < probs).to(probs.dtype)
    return (probs * (1 - probs)).sqrt_().mul_(_position_signs(keys, logits.shape[1], start))


def _gaussian(logits: Tensor, keys: Tensor, start: int, kind: str) -> Tensor:
    """√2 ε: the gradient of (z − ŷ)² for ŷ = z + ε/√2, the law whose negative log-likelihood is the squared error."""
    count = logits.shape[1]
    draw = noise.normal(keys, count, start) if kind == "labels" else _position_signs(keys, count, start)
    return draw.mul_(math.sqrt(2)).to(_wide(logits))


def _position_signs(keys: Tensor, count: int, start: int) -> Tensor:
    first = start % 64
    return noise.signs(keys, first + count, start // 64)[:, first:]


def _wide(logits: Tensor) -> torch.dtype:
    """What arithmetic runs in: fp32, or fp64 for fp64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)


def sample_categorical(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw one index a row by the inverse CDF, in two levels: which block of 256 entries, then which entry of it.

    One uniform number a row instead of one an entry, one pass over the probabilities, and cumulative sums so short that
    fp32 is enough for a vocabulary of any size. Entries of probability zero are never drawn.

    Args:
        probs: [n, vocab], rows need not be normalised exactly.
        uniform: [n], inside (0, 1).

    Returns:
        int64 [n].
    """
    vocab = probs.shape[-1]
    whole = vocab - vocab % _COARSE
    weight = probs[:, :whole].view(len(probs), -1, _COARSE).sum(-1)  # [n, blocks]
    if whole < vocab:
        weight = torch.cat((weight, probs[:, whole:].sum(-1, keepdim=True)), -1)
    coarse = weight.cumsum(-1)
    target = uniform.to(probs.dtype).unsqueeze(-1) * coarse[:, -1:]
    block = torch.searchsorted(coarse, target).clamp_max_(coarse.shape[-1] - 1)
    rest = target - (coarse.gather(-1, block) - weight.gather(-1, block))
    places = block * _COARSE + torch.arange(_COARSE, device=probs.device)  # [n, 256]
    # Beyond the end of the vocabulary stands its last entry again: whoever ends there is sent back to it.
    fine = probs.gather(-1, places.clamp_max_(vocab - 1)).cumsum(-1)
    # Rounding may have put the target outside the block: inside (0, total] the search ends on a possible entry.
    rest = rest.clamp_min_(torch.finfo(rest.dtype).tiny).minimum(fine[:, -1:])
    within = torch.searchsorted(fine, rest).clamp_max_(_COARSE - 1)
    return (block * _COARSE + within).squeeze(-1).clamp_max_(vocab - 1)
