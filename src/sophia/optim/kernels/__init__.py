"""Fused kernels: one pass over memory. One module a device type, imported when first used.

A module offers `problem()`, why it cannot run and what to do about it, or None; `sophia_()`, the step; and `fold_()`,
the curvature's. `update` says what they compute.
"""

import importlib
from types import ModuleType

_MODULES: dict[str, str] = {}  # device type -> module


def module(device_type: str) -> ModuleType:
    """The kernels for a device type that has no problem."""
    return importlib.import_module(_MODULES[device_type])


def problem(device_type: str) -> str | None:
    """Why there is no fused kernel for tensors on such a device, with the remedy; None where there is one."""
    if device_type not in _MODULES:
        return f"there is no fused kernel for {device_type}: leave fused=None, which takes the fastest path there is"
    answer: str | None = module(device_type).problem()
    return answer
