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
from torch.nn import functional as F

from sophia.optim import noise

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
NOISES = ("labels", "signs")

_BLOCK = 1 << 22  # outputs whose fp32 copies exist at one time
_COARSE = 256  # probabilities summed into one entry of the coarse table of the inverse CDF


def output_noise(
    logits: Tensor, mask: Tensor, keys: Tensor, *, likelihood: str, kind: str, vocab_size: int | None
) -> Tensor:
    """The vector r for a batch of outputs, zero where the mask is false.

    Args:
        logits: outputs [rows, positions, vocab] for "categorical", [rows, positions] otherwise.
        mask: bool [rows, positions].
        keys: int64 [rows], one stream of noise a row.
        likelihood: one of LIKELIHOODS.
        kind: one of NOISES.
        vocab_size: the number of real vocabulary entries; those above it get no probability and no gradient.

    Returns:
        A tensor of the logits' shape and dtype.
    """
    result = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    if likelihood == "categorical":
        width = logits.shape[-1] if vocab_size is None else vocab_size
        draw = _categorical_label if kind == "labels" else _categorical_sign
        logits, out = logits[..., :width], result[..., :width]
    else:
        width = 1
        draw = {"bernoulli": _bernoulli, "gaussian": _gaussian}[likelihood]
        out = result
    rows, positions = mask.shape
    for row, position in _blocks(rows, positions, width):
        part = logits[row, position]
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        vector = draw(part, keys[row], position.start, kind)
        hidden = ~mask[row, position]
        vector.masked_fill_(hidden if vector.dim() == hidden.dim() else hidden.unsqueeze(-1), 0)
        out[row, position] = vector.to(out.dtype)
    return result


def _categorical_label(logits: Tensor, keys: Tensor, start: int, kind: str) -> Tensor:
    """softmax(logits) − onehot(ŷ), ŷ ~ softmax(logits). [rows, positions, vocab]."""
    probs = logits.softmax(-1)
    uniform = noise.uniform(keys, logits.shape[1], start)
    labels = sample_categorical(probs.flatten(0, 1), uniform.flatten()).view_as(uniform).unsqueeze(-1)
    return probs.scatter_(-1, labels, probs.gather(-1, labels) - 1)


def _categorical_sign(logits: Tensor, keys: Tensor, start: int, kind: str) -> Tensor:
    """S v = √p ⊙ v − p (√p · v), where S = diag(√p) − p √pᵀ. [rows, positions, vocab]."""
    probs = logits.softmax(-1)
    rows, positions, vocab = probs.shape
    words = -(-vocab // 64)  # each position owns whole words of random bits
    v = noise.signs(keys, positions * words * 64, start * words).view(rows, positions, words * 64)[..., :vocab]
    root = probs.sqrt().mul_(v)
    return root.sub_(probs.mul_(root.sum(-1, keepdim=True)))


def _bernoulli(logits: Tensor, keys: Tensor, start: int, kind: str) -> Tensor:
    """σ(z) − ŷ with ŷ ~ Bernoulli(σ(z)), or √(σ(1 − σ)) v. [rows, positions]."""
    probs = logits.sigmoid()
    if kind == "labels":
        return probs - (noise.uniform(keys, logits.shape[1], start) < probs).to(probs.dtype)
    return (probs * (1 - probs)).sqrt_().mul_(_position_signs(keys, logits.shape[1], start))


def _gaussian(logits: Tensor, keys: Tensor, start: int, kind: str) -> Tensor:
    """√2 ε: the gradient of (z − ŷ)² for ŷ = z + ε/√2, the law whose negative log-likelihood is the squared error."""
    count = logits.shape[1]
    draw = noise.normal(keys, count, start) if kind == "labels" else _position_signs(keys, count, start)
    return draw.mul_(math.sqrt(2)).to(logits.dtype)


def _position_signs(keys: Tensor, count: int, start: int) -> Tensor:
    first = start % 64
    return noise.signs(keys, first + count, start // 64)[:, first:]


def sample_categorical(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw one index a row by the inverse CDF, in two levels: which block of 256 entries, then which entry of it.

    One uniform number a row instead of one an entry, and cumulative sums so short that fp32 is enough for a vocabulary
    of any size. Entries of probability zero are never drawn.

    Args:
        probs: [n, vocab], rows need not be normalised exactly.
        uniform: [n], inside (0, 1).

    Returns:
        int64 [n].
    """
    blocked = F.pad(probs, (0, -probs.shape[-1] % _COARSE)).view(len(probs), -1, _COARSE)  # [n, blocks, 256]
    weight = blocked.sum(-1)
    coarse = weight.cumsum(-1)
    target = uniform.to(probs.dtype).unsqueeze(-1) * coarse[:, -1:]
    block = torch.searchsorted(coarse, target).clamp_max_(coarse.shape[-1] - 1)
    rest = target - (coarse.gather(-1, block) - weight.gather(-1, block))
    chosen = blocked.gather(1, block.unsqueeze(-1).expand(-1, -1, _COARSE)).squeeze(1)
    fine = chosen.cumsum(-1)
    # Rounding may have put the target outside the block: inside (0, total] the search ends on a possible entry.
    rest = rest.clamp_min_(torch.finfo(rest.dtype).tiny).minimum(fine[:, -1:])
    within = torch.searchsorted(fine, rest).clamp_max_(_COARSE - 1)
    return (block * _COARSE + within).squeeze(-1).clamp_max_(probs.shape[-1] - 1)


def _blocks(rows: int, positions: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Cut [rows, positions] into blocks of at most _BLOCK outputs."""
    columns = max(1, min(positions, _BLOCK // width))
    lines = max(1, _BLOCK // (columns * width))
    for row in range(0, rows, lines):
        for position in range(0, positions, columns):
            yield slice(row, row + lines), slice(position, position + columns)
