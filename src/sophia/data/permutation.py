"""A shuffled order of n things that needs no table: where any place goes costs a few integer operations.

A Feistel network is a bijection whatever its round function is. The one here works on the pairs of an a x b grid
(Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains") rather than on bits: with a near sqrt(n) the grid has
about sqrt(n) places more than n at most, where one of bits would have up to four times n. A place that falls into the
surplus is sent through again until it comes out below n (cycle walking), which keeps the whole a bijection.

The order is part of what a run is: only wrapping uint64 arithmetic is used, which is the same on every platform and
for every version of numpy, and a test pins some values.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt

_ROUNDS = 24  # with 12 the orders of 6 things are not equally likely, with 16 those of 7 (chi-square over all of them)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)  # the finaliser of SplitMix64, as in optim/noise.py
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


class Permutation:
    """A bijection of 0 … size - 1, drawn by ``key``: equal keys give equal orders, others unrelated ones.

    Example:
        >>> sorted(Permutation(5, "any text")(np.arange(5)).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, key: str) -> None:
        assert 1 <= size < 1 << 62
        self.size = size
        columns = math.isqrt(size - 1) + 1  # ceil(sqrt(size))
        columns += columns % 2  # were both sides odd, every round would be an even permutation, and so the whole
        self._sides = np.uint64(columns), np.uint64(-(-size // columns))
        words = hashlib.shake_256(key.encode()).digest(8 * _ROUNDS)
        self._round_keys = np.frombuffer(words, dtype="<u8").astype(np.uint64)

    def __call__(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Send each place to another. places: int64 [n] within 0 … size - 1 -> int64 [n], the same range."""
        assert places.ndim == 1
        assert places.size == 0 or (int(places.min()) >= 0 and int(places.max()) < self.size)
        spots = self._shuffle(places.astype(np.uint64))
        outside = np.flatnonzero(spots >= np.uint64(self.size))
        while outside.size:  # ends: the grid's permutation has no cycle without a place below size that led into it
            spots[outside] = self._shuffle(spots[outside])
            outside = outside[spots[outside] >= np.uint64(self.size)]
        return spots.astype(np.int64)

    def _shuffle(self, spots: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Permute the whole grid; a spot is left + columns * right."""
        columns, rows = self._sides
        left, right = spots % columns, spots // columns
        for number, key in enumerate(self._round_keys):
            side = rows if number % 2 else columns  # the range of `left`, which changes sides every round
            left, right = right, (left + _mix(right + key) % side) % side
        # After an even number of rounds both are back on their sides.
        permuted: npt.NDArray[np.uint64] = left + columns * right
        return permuted


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scatter the bits of each word: a bijection of 64 bits."""
    words = (words ^ (words >> _SHIFT_1)) * _MIX_1
    words = (words ^ (words >> _SHIFT_2)) * _MIX_2
    scattered: npt.NDArray[np.uint64] = words ^ (words >> _SHIFT_3)
    return scattered
