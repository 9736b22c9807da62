"""Threads for a compiled loop: torch's own team of OpenMP workers where it can be reached, else threads of ours.

The loops take their work in pieces from a counter that they share, so it does not matter how many threads come, or
whether one of them is late. torch's workers are the better ones: after a parallel region they spin for a while, and
threads of ours would have to share the cores with them.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_Loop = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(loop: int, work: int, threads: int) -> None:
    """Call a compiled `void loop(void *work)` once on each of so many threads, and return when all have.

    Args:
        loop, work: addresses.
        threads: how many; the calling thread is one of them.
    """
    openmp = _openmp()
    if threads == 1:
        _Loop(loop)(work)
    elif openmp is not None:
        openmp(loop, work, threads, 0)
    else:
        others = [_pool(os.getpid(), threads - 1).submit(_Loop(loop), work) for _ in range(threads - 1)]
        _Loop(loop)(work)
        for other in others:
            other.result()


@functools.lru_cache(maxsize=1)
def _openmp() -> Callable[..., Any] | None:
    """`GOMP_parallel` of the OpenMP library that torch runs on: GNU's exports it, and LLVM's and Intel's on Linux."""
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@functools.lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    del process  # a fork has the object, and none of its threads
    return ThreadPoolExecutor(threads, thread_name_prefix="sophia")
