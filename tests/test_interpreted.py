"""The tests of the Triton kernels in Triton's interpreter: processes of their own, since it must be asked for early."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreter import HAS_TRITON, INTERPRETED

FILES = ("test_kernel_cuda.py", "test_capturable.py", "test_found_inf.py")


@pytest.mark.skipif(not HAS_TRITON and sys.platform != "linux", reason="Triton is for Linux")
@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
def test_kernels_in_tritons_interpreter():
    assert HAS_TRITON, "Triton is missing: the extra dev brings it; without it no test would run these kernels"
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n0",
        *(str(here / file) for file in FILES),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, cwd=here.parent, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    assert " passed" in ended.stdout
