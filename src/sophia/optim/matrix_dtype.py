"""In which dtype products of matrices are worth computing: what a device has units for."""

import functools

import torch

# From Ampere on, tensor cores multiply bf16; before they emulate it.
_AMPERE = (8, 0)


def product_dtype(chosen: str | None, device: torch.device, exact: torch.dtype) -> torch.dtype | None:
    """The dtype of rotations, quotients and Newton-Schulz steps, None for that of the arithmetic.

    Args:
        chosen: the setting: a dtype's name, None, or "auto": bf16 in place of fp32 where the device is made for it.
        device: where the matrices are.
        exact: in which all else is computed.
    """
    if chosen == "auto":
        return torch.bfloat16 if exact == torch.float32 and multiplies_bf16(device) else None
    dtype: torch.dtype | None = None if chosen is None else getattr(torch, chosen)
    return dtype


@functools.cache
def multiplies_bf16(device: torch.device) -> bool:
    """Whether products of bf16 are a multiple faster there than those of fp32: CUDA's tensor cores, or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= _AMPERE
    ask = getattr(torch.cpu, "get_capabilities", None)  # earlier versions of torch cannot tell
    return device.type == "cpu" and ask is not None and bool(ask().get("amx_bf16", False))
