"""The order of the windows: a bijection for every size, unrelated between keys, pinned for ever."""

import collections
import math

import numpy as np
import pytest

from sophia.data.permutation import Permutation

SIZES = [*range(1, 258), 511, 512, 513, 1000, 1023, 1024, 1025, 4095, 4097, 9999, 65_536, 99_991, 300_007]


def whole(size, key):
    return Permutation(size, key)(np.arange(size))


@pytest.mark.parametrize("key", ["", "a", "another"])
def test_it_is_a_bijection_for_every_size(key):
    for size in SIZES:
        order = whole(size, key)
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(size)), size


def test_any_places_in_any_order_give_the_same_as_the_whole():
    order = whole(1009, "key")
    some = np.array([1008, 0, 17, 17, 512])
    assert np.array_equal(Permutation(1009, "key")(some), order[some])
    assert Permutation(1009, "key")(some[:0]).tolist() == []


def test_sizes_that_no_table_could_hold():
    size = (1 << 61) + 12_345
    places = np.array([0, 1, 2, size - 2, size - 1])
    found = Permutation(size, "key")(places)
    assert len(set(found.tolist())) == 5
    assert found.min() >= 0
    assert found.max() < size


def test_an_order_never_changes():
    """What a version, a platform or a new numpy must not change: runs are resumed on it."""
    assert whole(10, "sophia").tolist() == [5, 3, 8, 7, 1, 6, 9, 0, 4, 2]
    assert Permutation(9_035_582, "sophia")(np.arange(4)).tolist() == [2378030, 6351215, 2688376, 8751772]


@pytest.mark.parametrize(("size", "expected"), [(2, 50), (3, 50), (4, 50), (5, 20), (6, 8)])
def test_all_orders_are_equally_likely(size, expected):
    orders = math.factorial(size)
    seen = collections.Counter(tuple(whole(size, f"key {k}")) for k in range(expected * orders))
    assert len(seen) == orders
    assert abs(deviations([seen[order] for order in seen], expected)) < 4


def test_pairs_of_places_land_everywhere_alike():
    """Not only where one place goes, but also where the next one goes beside it."""
    size, expected = 20, 10
    first = np.stack([Permutation(size, f"{k}")(np.array([11, 12])) for k in range(size * (size - 1) * expected)])
    counts = np.zeros((size, size), dtype=int)
    np.add.at(counts, (first[:, 0], first[:, 1]), 1)
    assert counts.trace() == 0
    assert abs(deviations(counts[~np.eye(size, dtype=bool)], expected)) < 4


def test_it_looks_like_chance():
    """Fixed points, neighbours that stay neighbours, and rises, each against its expectation over many keys."""
    size, keys = 1000, 400
    fixed, neighbours, rises = 0, 0, 0
    for k in range(keys):
        order = whole(size, f"key {k}")
        fixed += (order == np.arange(size)).sum()
        steps = np.diff(order)
        neighbours += (np.abs(steps) == 1).sum()
        rises += (steps > 0).sum()
    assert abs(fixed - keys) < 4 * math.sqrt(keys)  # Poisson of mean 1 each
    assert abs(neighbours - 2 * keys) < 4 * math.sqrt(2 * keys)
    assert abs(rises - keys * (size - 1) / 2) < 4 * math.sqrt(keys * (size + 1) / 12)


def test_orders_of_different_keys_are_unrelated():
    size = 2000
    orders = np.stack([whole(size, f"fingerprint {seed} {epoch}") for seed in range(6) for epoch in range(6)])
    correlations = np.corrcoef(orders)[np.triu_indices(len(orders), 1)] * math.sqrt(size)
    assert np.abs(correlations).max() < 4.5  # 630 standard normal numbers
    assert correlations.std() == pytest.approx(1, abs=0.15)
    same = [(a == b).sum() for i, a in enumerate(orders) for b in orders[:i]]
    assert np.mean(same) == pytest.approx(1, abs=4 / math.sqrt(len(same)))


def test_large_sizes_are_uniform_too():
    size = 1_000_003
    found = Permutation(size, "key")(np.arange(0, 64_000))  # neighbouring places scatter over the whole
    assert abs(deviations(np.bincount(found * 256 // size, minlength=256), 250)) < 4


def deviations(counts, expected):
    """How many standard deviations chi-square lies above what chance gives."""
    counts = np.asarray(counts)
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)
