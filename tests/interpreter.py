"""Where the Triton kernels can run: on a CUDA device, or on CPU tensors in Triton's interpreter.

The interpreter must be asked for (TRITON_INTERPRET=1) before Triton is imported, and it changes what `fused=True` means
on the CPU. So `test_interpreted.py` runs the tests that are marked here in a process of their own.
"""

import importlib.util

import pytest
import torch

from sophia.optim import kernels

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = kernels.interpreted() and HAS_TRITON
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

runs_kernels = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu",
    reason="no CUDA device here: tests/test_interpreted.py runs these in Triton's interpreter",
)
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def mend_rounding():
    """Let the interpreter round fp32 to bfloat16 as the hardware does: it cuts off."""
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter._convert_float

    def convert(data, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(data.copy()).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view("uint16")
        return plain(data, source, target, mode)

    interpreter._convert_float = convert


if INTERPRETED:
    mend_rounding()
