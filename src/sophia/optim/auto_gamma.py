"""γ that follows the clipped fraction: `gamma="auto"`.

A coordinate is clipped when |m| > max(γ h, ε). So where |m| > ε and h > 0 it is clipped as long as γ lies below
|m| / h, and the γ that clips a given share of them is a quantile of that ratio. It is read off a histogram whose bins
are the leading bits of the ratio as a float: 32 to an octave, and nothing to choose. The counts are whole numbers, so
their sum is the same whatever the number of ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sophia.optim import update
from sophia.optim.dtensor import local, shards
from sophia.optim.reach import Reach
from sophia.optim.replicas import Replicas

# Of a float32's 23 bits of mantissa 5 are kept.
_SHIFT = 18
# The last bin is infinity: coordinates that every γ clips. The first, below 1e-38, those that none does.
BINS = (0x7F800000 >> _SHIFT) + 1
# Of the coordinates that γ decides about at least and at most so many are clipped, however many others there are.
_LEAST, _MOST = 0.1, 0.9
# Elements at a time off the CPU: bounds the temporaries.
_PIECE = 1 << 24


def adjust(
    groups: Sequence[dict[str, Any]],
    states: Mapping[Tensor, dict[str, Any]],
    reach: Reach,
    replicas: Replicas,
) -> None:
    """Set γ of the groups with a `clip_target` from m and h as they are now; groups of one target have one γ.

    Waits for the device. All ranks call it and find the same. Where nothing has both momentum and curvature γ stays.
    """
    for target in dict.fromkeys(group["clip_target"] for group in groups if group["clip_target"] is not None):
        chosen = [group for group in groups if group["clip_target"] == target]
        gamma = quantile(_counts(chosen, states, reach, replicas).tolist(), target)
        if gamma is not None:
            for group in chosen:
                group["gamma"] = gamma


def quantile(counts: Sequence[int], target: float) -> float | None:
    """The γ that clips the share `target` of all coordinates; None where γ decides about none of them.

    Where those that are clipped or left alone at any γ make that impossible, γ clips between a tenth and nine tenths of
    the others.

    Args:
        counts: BINS numbers of coordinates, by the bin of |m| / h.
        target: between 0 and 1.
    """
    free, always = sum(counts[1:-1]), counts[-1]
    if free == 0:
        return None
    clipped = min(max(target * sum(counts) - always, min(target, _LEAST) * free), max(target, _MOST) * free)
    left = free - clipped  # to be left unclipped, from the smallest ratio on
    for place in range(1, BINS - 1):
        if left <= counts[place]:
            break
        left -= counts[place]
    low, high = _edge(place), _edge(place + 1)
    return low + (high - low) * (left / counts[place] if counts[place] else 0.0)


def histogram(exp_avg: Tensor, hessian: Tensor, *, eps: float) -> Tensor:
    """Coordinates by the bin of |m| / h, int64 [BINS] on their device."""
    counts = torch.zeros(BINS, dtype=torch.int64, device=exp_avg.device)
    dtype = update.compute_dtype(exp_avg, hessian)
    for m, h in _pieces(exp_avg, hessian):
        size = m.abs().to(dtype)
        ratio = (size / h.to(dtype)).masked_fill_(~(h > 0), torch.inf).masked_fill_(~(size > eps), 0)
        bins = ratio.float().view(torch.int32).bitwise_right_shift_(_SHIFT)
        counts += torch.bincount(bins.reshape(-1), minlength=BINS)
    return counts


def _counts(
    groups: Sequence[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]], reach: Reach, replicas: Replicas
) -> Tensor:
    """The histogram of all coordinates of these groups whose curvature is known, over all ranks, on a device."""
    total = torch.zeros(BINS, dtype=torch.int64, device=local(groups[0]["params"][0]).device)
    for group in groups:
        for p in group["params"]:
            if p in reach and p in states:
                counts = histogram(local(states[p]["exp_avg"]), local(states[p]["hessian"]), eps=group["eps"])
                # As many ranks as there are, divided by its shards, hold each shard: now every coordinate counts once
                # for each rank.
                total += counts.to(total.device) * (shards(p) if replicas.size > 1 else 1)
    return replicas.sum_shards(total)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    if tensors[0].device.type == "cpu":
        yield from update.slices(*tensors)
    elif tensors[0].numel() > 0:
        yield from zip(*(torch.split(tensor.reshape(-1), _PIECE) for tensor in tensors), strict=True)


def _edge(place: int) -> float:
    """The smallest ratio of a bin; of the last one the largest float32 below infinity."""
    bits = torch.tensor(min(place << _SHIFT, 0x7F7FFFFF), dtype=torch.int32)
    return float(bits.view(torch.float32))
