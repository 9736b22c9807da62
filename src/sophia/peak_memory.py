"""The memory that tensors take at most: resident on the CPU, handed out by PyTorch's allocator on CUDA."""

from pathlib import Path

import torch


def now(device: torch.device) -> int:
    """Bytes at this moment.

    Raises:
        ValueError: The device is the CPU, and the system does not tell.
    """
    return torch.cuda.memory_allocated() if device.type == "cuda" else _status("VmRSS")


def reset(device: torch.device) -> None:
    """Let the peak begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew


def peak(device: torch.device) -> int:
    """Most bytes since `reset`.

    Raises:
        ValueError: The device is the CPU, and the system does not tell.
    """
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    """A field of this process's status, in bytes."""
    path = Path("/proc/self/status")
    if not path.exists():
        raise ValueError(f"resident memory on the CPU is read from {path}, which this system does not have: use Linux")
    lines = path.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
