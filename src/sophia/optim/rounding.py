"""Stochastic rounding to bfloat16, whose noise is a pure function of (seed, t, tensor, element).

A state of 8 bits of mantissa, rounded to nearest, loses every change smaller than 2⁻⁹ of it: (1 − β1) g vanishes beside
m, and m stops. Rounded up or down at random, with the probabilities that make the expectation exact, nothing is lost.

Element i of a tensor (in the order of its memory) adds 16 bits of noise below the last bit that is kept, and truncates:

    x = i · 0x9E3779B1 + key(tensor, t);   noise = mix(x) & 0xFFFF;   bf16 = (bits(fp32) + noise) >> 16

in 32-bit arithmetic that wraps; mix is the finaliser of MurmurHash3 (Appleby, public domain). All paths and devices
compute the same, so replicas agree, and a run that goes on from a checkpoint is the run that never stopped. Negative
zero stays negative zero, whatever the noise: the mark of unreached curvature survives.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sophia.optim.noise import stream_key

# Of the spec above; the kernels repeat them.
ELEMENT_STRIDE = 0x9E3779B1
STEP_STRIDE = 0x85EBCA77
MIX_1 = 0x85EBCA6B
MIX_2 = 0xC2B2AE35

# Which of a parameter's two states.
EXP_AVG, HESSIAN = 0, 1

_WORD = (1 << 32) - 1
_BLOCK = 1 << 22  # elements rounded at a time where tensors are not sliced already: bounds the temporaries


def tensor_key(seed: int, number: int, which: int, shard: int = 0) -> int:
    """The 32-bit key of parameter `number` (in the order of the groups), its m or its h, and the shard of this rank."""
    return stream_key(seed, number, which, shard) & _WORD


def step_key(key: int, step: int | Tensor) -> int | Tensor:
    """The key of a tensor at t, as a signed 32-bit number; an int32 0-D tensor where t is one on a device."""
    if isinstance(step, Tensor):
        word = (step.to(torch.int64) * STEP_STRIDE + key) & _WORD
        return word.to(torch.int32)  # keeps the low 32 bits
    return _signed((key + step * STEP_STRIDE) & _WORD)


def write_(out: Tensor, value: Tensor, key: int | Tensor, *, origin: int = 0) -> None:
    """Round value into out, in place.

    Args:
        out: bfloat16, of any strides.
        value: of out's shape; read as fp32.
        key: from :func:`step_key`.
        origin: storage offset of the whole tensor that out is a part of; elements are numbered from there.
    """
    parts: tuple[Tensor, ...] = (out,)
    exact: tuple[Tensor, ...] = (value,)
    if out.is_contiguous():
        parts, exact = torch.split(out.view(-1), _BLOCK), torch.split(value.reshape(-1), _BLOCK)
    for part, own in zip(parts, exact, strict=True):
        _write_part(part, own.to(torch.float32), key, int(part.storage_offset()) - origin)


def _write_part(out: Tensor, value: Tensor, key: int | Tensor, first: int) -> None:
    x = _positions(out.shape, out.stride(), out.device).mul_(_signed(ELEMENT_STRIDE))
    x.add_(key).add_(_signed(first * ELEMENT_STRIDE & _WORD))
    noise = _mix_(x).bitwise_and_(0xFFFF)
    rounded = noise.add_(value.view(torch.int32)).bitwise_and_(-0x10000)
    # Infinity and NaN take no noise: it would turn one into the other, or wrap a NaN to a zero.
    out.copy_(torch.where(torch.isfinite(value), rounded.view(torch.float32), value))


def _positions(shape: Sequence[int], strides: Sequence[int], device: torch.device) -> Tensor:
    """Distance in memory of every element from the first, int32 of the given shape."""
    total = torch.zeros(tuple(shape), dtype=torch.int32, device=device)
    for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        steps = torch.arange(size, dtype=torch.int32, device=device).mul_(_signed(stride & _WORD))
        total += steps.view([-1 if d == dim else 1 for d in range(len(shape))])
    return total


def _mix_(x: Tensor) -> Tensor:
    # int32 products wrap as unsigned ones do; masks make the arithmetic right shifts logical.
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _signed(MIX_1)
    x ^= (x >> 13).bitwise_and_(0x7FFFF)
    x *= _signed(MIX_2)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _signed(word: int) -> int:
    """The int32 with the same bits as a 32-bit unsigned number."""
    return word - (1 << 32) if word >= 1 << 31 else word
