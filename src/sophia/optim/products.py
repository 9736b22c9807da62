"""Matrix products of a model's last layer, whose results are taken or added up in a higher precision than they have."""

import torch
from torch import Tensor

# Rows of a sum whose next term, where it is not added in place, exists at the same time: few enough for the processor's
# cache.
BLOCK = 4096


def linear_dtype(inputs: Tensor, weight: Tensor) -> torch.dtype:
    """What a linear layer of this weight computes in, here and now: autocast's dtype, which leaves fp64 alone."""
    device = inputs.device.type
    dtype = torch.promote_types(inputs.dtype, weight.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``left @ right``, written into ``out``, whose dtype may be a higher one."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.device.type == "cuda":  # where the product's own sums, in fp32, are to be had
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return out.copy_(left @ right)


def add_product_(total: Tensor, left: Tensor, right: Tensor, *, first: bool = False) -> None:
    """``total += left @ right``, added up in the dtype of ``total``, which the first product overwrites."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=0 if first else 1)
        return
    for start in range(0, len(total), BLOCK):
        part = slice(start, start + BLOCK)
        on_gpu = left.device.type == "cuda"
        term = torch.mm(left[part], right, out_dtype=total.dtype) if on_gpu else left[part] @ right
        if first:
            total[part] = term
        else:
            total[part] += term
