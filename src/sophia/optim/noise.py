"""Random numbers as pure functions of what they belong to, never of how often something was called.

Curvature estimates need noise: sampled labels, random signs, Hutchinson's vector. Were it drawn from a generator,
the estimate would depend on the number of ranks and on everything drawn before. Here each number is a hash of
(seed, step, row, position), the finaliser of SplitMix64 (Steele, Lea, Flood 2014), evaluated with tensor arithmetic:
the same on every device, for any batch layout.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_BLOCK = 1 << 20  # elements hashed at a time, so that integer temporaries stay in the cache


def stream_key(*parts: int) -> int:
    """Fold integers into one 64-bit key, sensitive to their order."""
    key = 0
    for part in parts:
        key = _finalise((key ^ (part & _MASK)) + _GOLDEN & _MASK)
    return key


def row_keys(key: int, rows: Tensor) -> Tensor:
    """One stream per row. rows: int64 [B] -> int64 [B]."""
    return _finalise_tensor(rows * _signed(_GOLDEN) + _signed(key))


def bits(keys: Tensor, count: int, start: int = 0) -> Tensor:
    """64 random bits for positions start … start + count of each stream. keys: int64 [B] -> int64 [B, count]."""
    positions = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=keys.device)
    return _finalise_tensor(keys.unsqueeze(-1) + positions * _signed(_GOLDEN))


def uniform(keys: Tensor, count: int, start: int = 0) -> Tensor:
    """Uniform fp32 numbers strictly inside (0, 1), of 24 bits. keys: int64 [B] -> float32 [B, count]."""
    # Shifted to 23 bits plus a half: fp32 holds every such number exactly, so that none rounds up to 1.
    top = (bits(keys, count, start) >> 41) & ((1 << 23) - 1)
    return (top.to(torch.float32) + 0.5) * 2.0**-23


def normal(keys: Tensor, count: int, start: int = 0) -> Tensor:
    """Standard normal fp32 numbers (Box-Muller). keys: int64 [B] -> float32 [B, count]."""
    word = bits(keys, count, start)
    radius = (((word >> 41) & ((1 << 23) - 1)).to(torch.float32) + 0.5) * 2.0**-23
    angle = (word & ((1 << 24) - 1)).to(torch.float32) * (2 * math.pi * 2.0**-24)
    return radius.log_().mul_(-2).sqrt_().mul_(angle.cos_())


def signs(keys: Tensor, count: int, start: int = 0) -> Tensor:
    """Random ±1, one bit of the hash each. keys: int64 [B] -> float32 [B, count]; start in units of 64 signs."""
    words = bits(keys, -(-count // 64), start)
    octets = words.view(torch.uint8).unsqueeze(-1)  # [B, words * 8, 1]
    places = torch.arange(8, dtype=torch.uint8, device=keys.device)
    ones = ((octets >> places) & 1).flatten(1)[:, :count]
    return ones.to(torch.float32).mul_(2).sub_(1)


def filled(shape: Sequence[int], key: int, kind: str, device: torch.device) -> Tensor:
    """One fp32 tensor of "gaussian" or "rademacher" noise, an element a function of (key, its flat index)."""
    out = torch.empty(math.prod(shape), dtype=torch.float32, device=device)
    draw, unit = (normal, 1) if kind == "gaussian" else (signs, 64)
    keys = torch.tensor([_signed(key)], dtype=torch.int64, device=device)
    for first in range(0, out.numel(), _BLOCK):
        block = out[first : first + _BLOCK]
        block.copy_(draw(keys, block.numel(), first // unit).squeeze(0))
    return out.view(tuple(shape))


@contextlib.contextmanager
def forked_rng(devices: Sequence[torch.device], key: int) -> Iterator[None]:
    """Seed torch's global generators from key, and put them back at the end.

    A forward pass for the curvature draws dropout masks; without this the masks of the training passes that follow
    would differ from those of the same loop under AdamW. Only the generators of `devices` (and the CPU's) are touched.
    """
    generators = [torch.default_generator]
    for device in devices:
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            generators.append(torch.cuda.default_generators[index])
        elif device.type == "mps":
            generators.append(torch.mps._get_default_mps_generator())
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(key & ((1 << 63) - 1))
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _finalise(word: int) -> int:
    word = ((word ^ (word >> 30)) * _MIX_1) & _MASK
    word = ((word ^ (word >> 27)) * _MIX_2) & _MASK
    return word ^ (word >> 31)


def _finalise_tensor(word: Tensor) -> Tensor:
    # int64 multiplication wraps like uint64's; the arithmetic right shift is made logical by masking the sign's copies.
    word = (word ^ ((word >> 30) & ((1 << 34) - 1))) * _signed(_MIX_1)
    word = (word ^ ((word >> 27) & ((1 << 37) - 1))) * _signed(_MIX_2)
    return word ^ ((word >> 31) & ((1 << 33) - 1))


def _signed(word: int) -> int:
    """The int64 with the same bits as a 64-bit unsigned number."""
    return word - (1 << 64) if word >= 1 << 63 else word
