"""Fused kernels: one pass over memory. One module a device type, imported when first used.

A module offers `problem()`, why it cannot run and what to do about it, or None; `sophia_()`, the step; and `fold_()`,
the curvature's. `update` says what they compute. Both return the indices of tensors that they have no kernel for and
left alone, and may keep in the dict `kept` what helps the next step.
"""

import importlib
import os
from types import ModuleType

from torch import Tensor

_MODULES = {"cpu": "sophia.optim.kernels.cpu", "cuda": "sophia.optim.kernels.cuda"}

# Elements of an optimizer from which a kernel earns back, in some thousand steps, the second that numba takes.
_LEAST_ELEMENTS = {"cpu": 1 << 20}


def interpreted() -> bool:
    """Whether Triton's interpreter runs CUDA's kernels on CPU tensors: fused=True is that, then. For tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def readable(tensor: Tensor) -> bool:
    """Whether the host can look at a tensor without waiting: in main memory, unless the interpreter is the device."""
    return tensor.device.type == "cpu" and not interpreted()


def module(device_type: str) -> ModuleType:
    """The kernels for a device type that has no problem."""
    if device_type == "cpu" and interpreted():
        device_type = "cuda"
    return importlib.import_module(_MODULES[device_type])


def problem(device_type: str) -> str | None:
    """Why there is no fused kernel for tensors on such a device, with the remedy; None where there is one."""
    if device_type not in _MODULES and not (device_type == "cpu" and interpreted()):
        return f"there is no fused kernel for {device_type}: leave fused=None, which takes the fastest path there is"
    answer: str | None = module(device_type).problem()
    return answer


def pays(device_type: str, elements: int) -> bool:
    """Whether a kernel is worth its compilation for so many elements, where nobody has asked for it."""
    if device_type == "cpu" and interpreted():  # very slow: on demand only
        return False
    return elements >= _LEAST_ELEMENTS.get(device_type, 0)
