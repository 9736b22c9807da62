"""The rule as loops over memory, compiled by numba for the dtypes that are asked for.

A loop goes through CHUNK elements at a time: few enough to count in 32 bits, and while it does, the chunk after next is
fetched. Without these prefetches the streams falter at every page, and each operation costs time, though memory should
be all that is waited for (docs/performance.md).
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types

from sophia.optim.kernels.cpu_words import (
    LOADS,
    STORES,
    WORDS,
    add_to,
    at,
    following,
    place,
    prefetch,
    store_stochastic,
)

CHUNK = 128
LINE = 64  # bytes that memory comes in

# A row of the table is a tensor: the number of elements of all tensors before it, its rounding key, the addresses of
# its arrays. One more row ends the last tensor.
START, KEY, ADDRESSES = range(3)
# Entries of the work: the next element to take, elements of a piece, elements in all, tensors, and the addresses of the
# table, of the float64 constants and of the int64 count.
NEXT, PIECE, TOTAL, TENSORS, TABLE, CONSTANTS, COUNT, ENTRIES = range(8)
# Constants of a step, and of a fold.
DECAY, LR, BETA, WEIGHT, GAMMA, EPS, STEP_CONSTANTS = range(7)
FOLD_BETA, FOLD_WEIGHT, FOLD_CONSTANTS = range(3)

# As torch's arithmetic, but for fused multiply-add; NaN and division by zero as in IEEE 754.
compiled = njit(nogil=True, fastmath={"contract"}, error_model="numpy")


@functools.cache
def step_loop(param: torch.dtype, grad: torch.dtype, exp_avg: torch.dtype, hessian: torch.dtype, noisy: bool) -> Any:
    """One step of Sophia on tensors of these dtypes: a compiled `void loop(void *work)`, its address in `.address`.

    noisy: momentum, which is bfloat16, is rounded stochastically.
    """
    real = real_of(param, grad, exp_avg, hessian)
    load_p, load_g, load_m, load_h = (LOADS[dtype] for dtype in (param, grad, exp_avg, hessian))
    word_p, word_g, word_m, word_h = (WORDS[dtype] for dtype in (param, grad, exp_avg, hessian))
    store_p, store_m = STORES[param], store_stochastic if noisy else STORES[exp_avg]
    fetch = _fetch(word_p, word_g, word_m, word_h)
    one = real(1)

    @compiled
    def chunk(p: Any, g: Any, m: Any, h: Any, first: int, n: int, key: int, constants: Any) -> Any:
        decay, lr, beta = real(constants[DECAY]), real(constants[LR]), real(constants[BETA])
        weight, gamma, eps = real(constants[WEIGHT]), real(constants[GAMMA]), real(constants[EPS])
        clipped, spot = np.int32(0), place(first, key)
        for i in range(n):
            momentum = beta * real(load_m(m[i])) + weight * real(load_g(g[i]))
            bound = gamma * real(load_h(h[i]))
            bound = eps if bound < eps else bound
            clipped = np.int32(clipped + np.int32(abs(momentum) > bound))
            update = momentum / bound
            update = -one if update < -one else update
            update = one if update > one else update
            store_p(p, i, decay * real(load_p(p[i])) - lr * update, spot)
            store_m(m, i, momentum, spot)
            spot = following(spot)
        return clipped

    @compiled
    def span(row: Any, first: int, stop: int, constants: Any) -> Any:
        count = 0
        while first < stop:
            n = min(CHUNK, stop - first)
            p, g = at(row[ADDRESSES], word_p, first), at(row[ADDRESSES + 1], word_g, first)
            m, h = at(row[ADDRESSES + 2], word_m, first), at(row[ADDRESSES + 3], word_h, first)
            fetch(p, g, m, h)
            count += chunk(p, g, m, h, first, n, row[KEY], constants)
            first += n
        return count

    return over_pieces(span, arrays=4, constants=STEP_CONSTANTS)


@functools.cache
def fold_loop(hessian: torch.dtype, estimate: torch.dtype, noisy: bool) -> Any:
    """h ← beta · h + weight · ĥ on tensors of these dtypes; as :func:`step_loop`."""
    real = real_of(hessian, estimate)
    load_h, load_e, word_h, word_e = LOADS[hessian], LOADS[estimate], WORDS[hessian], WORDS[estimate]
    store_h = store_stochastic if noisy else STORES[hessian]

    @compiled
    def span(row: Any, first: int, stop: int, constants: Any) -> Any:
        beta, weight = real(constants[FOLD_BETA]), real(constants[FOLD_WEIGHT])
        h, e = at(row[ADDRESSES], word_h, 0), at(row[ADDRESSES + 1], word_e, 0)
        spot = place(first, row[KEY])
        for i in range(first, stop):
            store_h(h, i, beta * real(load_h(h[i])) + weight * real(load_e(e[i])), spot)
            spot = following(spot)
        return 0

    return over_pieces(span, arrays=2, constants=FOLD_CONSTANTS)


@functools.cache
def floor_loop(prefetched: bool) -> Any:
    """The traffic of an fp32 step with next to no arithmetic, to measure the step against; as :func:`step_loop`."""
    word = WORDS[torch.float32]
    fetch = _fetch(word, word, word, word)
    length = CHUNK if prefetched else 1 << 62

    @compiled
    def chunk(p: Any, g: Any, m: Any, h: Any, n: int) -> None:
        half = np.float32(0.5)
        for i in range(n):
            p[i] = half * (p[i] + h[i])
            m[i] = half * (m[i] + g[i])

    @compiled
    def span(row: Any, first: int, stop: int, constants: Any) -> Any:
        while first < stop:
            n = min(length, stop - first)
            p, g = at(row[ADDRESSES], word, first), at(row[ADDRESSES + 1], word, first)
            m, h = at(row[ADDRESSES + 2], word, first), at(row[ADDRESSES + 3], word, first)
            if prefetched:
                fetch(p, g, m, h)
            chunk(p, g, m, h, n)
            first += n
        return 0

    return over_pieces(span, arrays=4, constants=1)


@functools.cache
def _fetch(*words: Any) -> Any:
    """Bring the chunk after next of four arrays into the cache, in the order in which it will be needed."""
    every_p, every_g, every_m, every_h = (LINE // np.dtype(word).itemsize for word in words)
    every = min(every_p, every_g, every_m, every_h)

    @compiled
    def fetch(p: Any, g: Any, m: Any, h: Any) -> None:
        for i in range(2 * CHUNK, 3 * CHUNK, every):
            if i % every_p == 0:
                prefetch(p, i)
            if i % every_g == 0:
                prefetch(g, i)
            if i % every_m == 0:
                prefetch(m, i)
            if i % every_h == 0:
                prefetch(h, i)

    return fetch


def over_pieces(span: Any, *, arrays: int, constants: int) -> Any:
    """Take pieces of the work, as long as there are any, and call span(row, first, stop, constants) for each tensor."""
    columns = ADDRESSES + arrays

    @cfunc(types.void(types.int64))
    def loop(address: int) -> None:
        work = carray(at(address, np.int64, 0), (ENTRIES,))
        table = carray(at(work[TABLE], np.int64, 0), (work[TENSORS] + 1, columns))
        numbers = carray(at(work[CONSTANTS], np.float64, 0), (constants,))
        count = 0
        while True:
            first = add_to(address, work[PIECE])
            stop = min(first + work[PIECE], work[TOTAL])
            if first >= stop:
                break
            index, above = 0, work[TENSORS]
            while above - index > 1:  # the tensor that has element `first`
                middle = (index + above) // 2
                if table[middle, START] <= first:
                    index = middle
                else:
                    above = middle
            while first < stop:
                start, end = table[index, START], min(stop, table[index + 1, START])
                count += span(table[index], first - start, end - start, numbers)
                first = end
                index += 1
        add_to(work[COUNT], count)

    return loop


def real_of(*dtypes: torch.dtype) -> Any:
    """What a loop on tensors of these dtypes computes in."""
    return np.float64 if torch.float64 in dtypes else np.float32
