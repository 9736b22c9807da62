"""What a step of SophiaK does entry by entry, as loops over memory, compiled as those of `cpu_loops`."""

import functools
from typing import Any

import numpy as np
import torch

from sophia.optim.kernels.cpu_loops import ADDRESSES, CHUNK, KEY, LINE, compiled, over_pieces, real_of
from sophia.optim.kernels.cpu_words import LOADS, STORES, WORDS, at, following, place, prefetch, store_stochastic

# Constants of each loop.
AHEAD_WEIGHT, AHEAD_SIGN, AHEAD_SHARE, AHEAD_CONSTANTS = range(4)
ADAM_WEIGHT, ADAM_SQUARE, ADAM_SIGN, ADAM_M, ADAM_G, ADAM_V, ADAM_EPS, ADAM_LR, ADAM_DECAY, ADAM_CONSTANTS = range(10)
ADD_LR, ADD_DECAY, ADD_CONSTANTS = range(3)


@functools.cache
def ahead_loop(grad: torch.dtype, exp_avg: torch.dtype, ahead: torch.dtype, noisy: bool) -> Any:
    """m ← m + weight (g − m), and beside it what is stepped along, x ← m + share (g − m).

    noisy: momentum, which is bfloat16, is rounded stochastically; x is then made of what is stored.
    """
    real = real_of(grad, exp_avg)
    load_g, load_m, word_g, word_m, word_x = LOADS[grad], LOADS[exp_avg], WORDS[grad], WORDS[exp_avg], WORDS[ahead]
    store_m, store_x = store_stochastic if noisy else STORES[exp_avg], STORES[ahead]
    fetch_g, fetch_m, fetch_x = _fetching(word_g), _fetching(word_m), _fetching(word_x)

    @compiled
    def chunk(g: Any, m: Any, x: Any, first: int, n: int, key: int, constants: Any) -> None:
        weight, sign, share = real(constants[AHEAD_WEIGHT]), real(constants[AHEAD_SIGN]), real(constants[AHEAD_SHARE])
        spot = place(first, key)
        for i in range(n):
            gradient = sign * real(load_g(g[i]))
            momentum = real(load_m(m[i]))
            store_m(m, i, momentum + weight * (gradient - momentum), spot)
            momentum = real(load_m(m[i]))
            store_x(x, i, momentum + share * (gradient - momentum), spot)
            spot = following(spot)

    @compiled
    def span(row: Any, first: int, stop: int, constants: Any) -> Any:
        while first < stop:
            n = min(CHUNK, stop - first)
            g, m = at(row[ADDRESSES], word_g, first), at(row[ADDRESSES + 1], word_m, first)
            x = at(row[ADDRESSES + 2], word_x, first)
            fetch_g(g)
            fetch_m(m)
            fetch_x(x)
            chunk(g, m, x, first, n, row[KEY], constants)
            first += n
        return 0

    return over_pieces(span, arrays=3, constants=AHEAD_CONSTANTS)


@functools.cache
def adam_loop(param: torch.dtype, grad: torch.dtype, exp_avg: torch.dtype, exp_avg_sq: torch.dtype, noisy: bool) -> Any:
    """m ← m + weight (g − m);  v ← v + square (g² − v);  θ ← decay θ − lr (a m + b g) / (√(c v) + ε).

    noisy: as of :func:`ahead_loop`.
    """
    real = real_of(param, grad, exp_avg, exp_avg_sq)
    load_p, load_g, load_m, load_v = (LOADS[dtype] for dtype in (param, grad, exp_avg, exp_avg_sq))
    word_p, word_g, word_m, word_v = (WORDS[dtype] for dtype in (param, grad, exp_avg, exp_avg_sq))
    store_p, store_v, store_m = STORES[param], STORES[exp_avg_sq], store_stochastic if noisy else STORES[exp_avg]
    fetch_p, fetch_g, fetch_m, fetch_v = (_fetching(word) for word in (word_p, word_g, word_m, word_v))

    @compiled
    def chunk(p: Any, g: Any, m: Any, v: Any, first: int, n: int, key: int, constants: Any) -> None:
        weight, square, sign = real(constants[ADAM_WEIGHT]), real(constants[ADAM_SQUARE]), real(constants[ADAM_SIGN])
        of_m, of_g, of_v = real(constants[ADAM_M]), real(constants[ADAM_G]), real(constants[ADAM_V])
        eps, lr, decay = real(constants[ADAM_EPS]), real(constants[ADAM_LR]), real(constants[ADAM_DECAY])
        spot = place(first, key)
        for i in range(n):
            gradient = sign * real(load_g(g[i]))
            momentum = real(load_m(m[i]))
            store_m(m, i, momentum + weight * (gradient - momentum), spot)
            ahead = of_m * real(load_m(m[i])) + of_g * gradient
            squares = real(load_v(v[i]))
            squares = squares + square * (gradient * gradient - squares)
            store_v(v, i, squares, spot)
            store_p(p, i, decay * real(load_p(p[i])) - lr * (ahead / (np.sqrt(of_v * squares) + eps)), spot)
            spot = following(spot)

    @compiled
    def span(row: Any, first: int, stop: int, constants: Any) -> Any:
        while first < stop:
            n = min(CHUNK, stop - first)
            p, g = at(row[ADDRESSES], word_p, first), at(row[ADDRESSES + 1], word_g, first)
            m, v = at(row[ADDRESSES + 2], word_m, first), at(row[ADDRESSES + 3], word_v, first)
            fetch_p(p)
            fetch_g(g)
            fetch_m(m)
            fetch_v(v)
            chunk(p, g, m, v, first, n, row[KEY], constants)
            first += n
        return 0

    return over_pieces(span, arrays=4, constants=ADAM_CONSTANTS)


@functools.cache
def add_loop(param: torch.dtype, update: torch.dtype, factor: torch.dtype) -> Any:
    """θ ← decay θ − lr factor u, with one factor for a tensor, which lies in memory as the others do."""
    real = real_of(param, update, factor)
    load_p, load_u, load_f, store_p = LOADS[param], LOADS[update], LOADS[factor], STORES[param]
    word_p, word_u, word_f = WORDS[param], WORDS[update], WORDS[factor]
    fetch_p, fetch_u = _fetching(word_p), _fetching(word_u)

    @compiled
    def chunk(p: Any, u: Any, rate: Any, n: int, decay: Any) -> None:
        for i in range(n):
            store_p(p, i, decay * real(load_p(p[i])) - rate * real(load_u(u[i])), 0)

    @compiled
    def span(row: Any, first: int, stop: int, constants: Any) -> Any:
        decay = real(constants[ADD_DECAY])
        rate = real(constants[ADD_LR]) * real(load_f(at(row[ADDRESSES + 2], word_f, 0)[0]))
        while first < stop:
            n = min(CHUNK, stop - first)
            p, u = at(row[ADDRESSES], word_p, first), at(row[ADDRESSES + 1], word_u, first)
            fetch_p(p)
            fetch_u(u)
            chunk(p, u, rate, n, decay)
            first += n
        return 0

    return over_pieces(span, arrays=3, constants=ADD_CONSTANTS)


@functools.cache
def _fetching(word: Any) -> Any:
    """Bring the chunk after next of an array into the cache."""
    every = LINE // np.dtype(word).itemsize

    @compiled
    def fetch(array: Any) -> None:
        for i in range(2 * CHUNK, 3 * CHUNK, every):
            prefetch(array, i)

    return fetch
