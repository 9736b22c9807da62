"""Batches: what every step sees, whoever asks and in whatever pieces."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from sophia.data.loader import Batches, validation_windows
from sophia.data.shards import write_dataset


class Line:
    """A split whose token at every place is the place itself."""

    def __init__(self, tokens):
        self.tokens = tokens

    def windows(self, starts, length):
        assert starts.dtype == np.int64
        assert all(0 <= start <= self.tokens - length for start in starts)
        return starts[:, None] + np.arange(length)


class Lines:
    """A data folder made of such."""

    def __init__(self, train=1001, validation=1001, fingerprint="f00d"):
        self.train, self.validation, self.fingerprint = Line(train), Line(validation), fingerprint


def batches(tokens=1001, *, context=10, rows=8, seed=0, fingerprint="f00d"):
    return Batches(Lines(tokens, fingerprint=fingerprint), context=context, rows=rows, seed=seed)


def starts(source, steps):
    """Where the rows of some steps begin, one after the other."""
    return [start for t in steps for start in source.step(t)[0][:, 0].tolist()]


def test_shapes_and_targets():
    inputs, targets = batches().step(3)
    assert inputs.shape == targets.shape == (8, 10)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(10))


@pytest.mark.parametrize("tokens", [11, 20, 21, 22, 1000, 1001, 1010, 1011])
@pytest.mark.parametrize("rows", [1, 3, 8, 100, 250])
def test_every_epoch_visits_every_window_once(tokens, rows):
    """Whatever the batch: also one that straddles epochs, or holds several."""
    source = batches(tokens, rows=rows)
    windows = (tokens - 1) // 10
    assert source.windows_per_epoch == windows
    epochs = 3
    steps = range(-(-epochs * windows // rows))
    seen = starts(source, steps)
    orders = [seen[epoch * windows : (epoch + 1) * windows] for epoch in range(epochs)]
    assert sorted(orders[0]) == [10 * w for w in range(windows)]
    for order in orders[1:]:
        shift = min(order)
        assert 0 <= shift < 10
        assert sorted(order) == [min(10 * w + shift, tokens - 11) for w in range(windows)]
    if windows > 20:
        assert orders[0] != sorted(orders[0])
        unshifted = [[start // 10 for start in order] for order in orders]
        assert unshifted[0] != unshifted[1] != unshifted[2]


def test_every_epoch_cuts_elsewhere():
    source = batches(10_011, context=1000, rows=10)
    shifts = [min(starts(source, [epoch])) for epoch in range(60)]
    assert shifts[0] == 0
    assert len(set(shifts)) > 50
    assert max(shifts) > 800
    other = batches(10_011, context=1000, rows=10, seed=1)
    assert shifts[1:] != [min(starts(other, [epoch])) for epoch in range(1, 60)]


def test_rows_are_dealt_from_one_sequence_whatever_the_batch():
    by_eights = starts(batches(rows=8), range(30))
    assert starts(batches(rows=12), range(20)) == by_eights
    assert starts(batches(rows=1), range(240)) == by_eights


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("index", [0, 3, 987_654_321])
def test_ranks_and_micro_batches_see_the_same_global_batch(ranks, micro, index):
    """Step 3 straddles the first two epochs."""
    source = batches(301, rows=32)
    inputs, targets = source.step(index)
    share = 32 // ranks
    for rank in range(ranks):
        for first in range(rank * share, (rank + 1) * share, micro):
            rows = range(first, min(first + micro, (rank + 1) * share))
            part = source.step(index, rows)
            assert torch.equal(part[0], inputs[rows.start : rows.stop])
            assert torch.equal(part[1], targets[rows.start : rows.stop])
    for rows in (range(0, 32, ranks), [31, 0, 7, 7, 2], range(31, -1, -1), np.array([4, 1]), [], range(0)):
        part = source.step(index, rows)
        assert part[0].shape == (len(rows), 10)
        assert torch.equal(part[0], inputs[list(rows)])


def test_a_step_is_a_function_of_fingerprint_seed_and_index():
    source = batches()
    late = source.step(12_345)[0]
    for t in (0, 99, 3):
        source.step(t)
    assert torch.equal(source.step(12_345)[0], late)
    assert torch.equal(batches().step(12_345)[0], late)
    for other in (batches(seed=1), batches(seed=2**64 - 1), batches(fingerprint="beef")):
        assert not torch.equal(other.step(12_345)[0], late)


def test_what_a_run_sees_never_changes():
    """Runs resume on it, on another machine and with another numpy."""
    source = batches(10_001, rows=4, seed=7)
    assert source.starts(0).tolist() == [660, 9290, 4210, 6090]
    assert source.starts(1_000_000).tolist() == [8124, 2764, 5534, 6094]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"context": 0}, ["context is 0", "at least 1"]),
        ({"rows": 0}, ["rows is 0", "at least 1"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"seed": 2**64}, ["seed is", "below 2\\*\\*64"]),
        ({"tokens": 10}, ["training data has 10 tokens", "sequence of 10", "at most 9"]),
        ({"tokens": 1}, ["training data has 1 tokens", "give more text"]),
        ({"tokens": 0}, ["training data has 0 tokens", "at most 1"]),
    ],
)
def test_impossible_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=".*".join(words)):
        batches(**settings)


@pytest.mark.parametrize(
    ("index", "rows", "words"),
    [(-1, None, "data step is -1"), (0, [0, 8], "row 8 .*rows 0 to 7"), (0, range(-1, 2), "row -1 ")],
)
def test_steps_and_rows_that_do_not_exist_are_refused(index, rows, words):
    with pytest.raises(ValueError, match=words):
        batches().step(index, rows)


def test_rows_are_whole_numbers():
    with pytest.raises(TypeError):
        batches().step(0, [0.5])


# ---- evaluation


@pytest.mark.parametrize("tokens", [11, 20, 101, 1000, 1001])
@pytest.mark.parametrize("limit", [1, 3, 7, 99, 100, 10_000, None])
def test_validation_windows_are_fixed_spread_and_do_not_overlap(tokens, limit):
    windows = validation_windows(Lines(validation=tokens), context=10, limit=limit)
    available = (tokens - 1) // 10
    assert windows.count == min(available, limit or available)
    assert windows.tokens == 10 * windows.count
    inputs, targets = windows.batch(range(windows.count))
    assert torch.equal(targets, inputs + 1)
    gaps = torch.diff(inputs[:, 0])
    assert (gaps >= 10).all()
    if windows.count > 1:
        assert gaps.max() - gaps.min() <= 10  # as even as the grid allows
    again = validation_windows(Lines(validation=tokens), context=10, limit=limit)
    assert torch.equal(again.batch(range(again.count))[0], inputs)


def test_ranks_share_the_validation_windows():
    windows = validation_windows(Lines(), context=10, limit=37)
    whole = windows.batch(range(37))[0]
    shares = [windows.batch(range(rank, 37, 4)) for rank in range(4)]
    assert sum(len(inputs) for inputs, _ in shares) == 37
    for rank, (inputs, targets) in enumerate(shares):
        assert torch.equal(inputs, whole[rank::4])
        assert torch.equal(targets, inputs + 1)
    assert windows.batch([])[0].shape == (0, 10)  # a rank may have no share


def test_impossible_validation_windows_are_refused():
    for tokens in (0, 10):
        with pytest.raises(ValueError, match=f"validation data has {tokens} tokens.*hold back a larger share"):
            validation_windows(Lines(validation=tokens), context=10, limit=None)
    with pytest.raises(ValueError, match="limit of validation windows 0"):
        validation_windows(Lines(), context=10, limit=0)
    with pytest.raises(ValueError, match="context is 0"):
        validation_windows(Lines(), context=0, limit=None)
    windows = validation_windows(Lines(), context=10, limit=5)
    for wrong in ([5], [-1]):
        with pytest.raises(ValueError, match=f"window {wrong[0]} "):
            windows.batch(wrong)


# ---- on real shards


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Documents over several shards, of which windows know nothing."""
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, **{f"w{n}": n for n in range(1, 5000)}}))
    generator = np.random.default_rng(0)
    documents = [generator.integers(1, 5000, size=n) for n in generator.integers(1, 90, size=60)]
    folder = tmp_path_factory.mktemp("data") / "shards"
    return write_dataset(folder, tokenizer, train=documents, validation=documents[:9], shard_tokens=400)


def test_windows_come_from_the_shards(dataset):
    assert len(dataset.train.shards) > 3
    source = Batches(dataset, context=32, rows=6, seed=3)
    stream = dataset.train.read(0, dataset.train.tokens).astype(np.int64)
    for t in range(2 * source.windows_per_epoch // 6):
        inputs, targets = source.step(t)
        for row, start in enumerate(source.starts(t).tolist()):
            assert inputs[row].tolist() == stream[start : start + 32].tolist()
            assert targets[row].tolist() == stream[start + 1 : start + 33].tolist()


def test_an_epoch_predicts_every_token_once(dataset):
    """All but the very first token, and the rest at the end that fills no window."""
    source = Batches(dataset, context=16, rows=1, seed=0)
    seen = torch.cat([source.step(t)[1] for t in range(source.windows_per_epoch)])
    stream = dataset.train.read(1, 1 + 16 * source.windows_per_epoch).astype(np.int64)
    assert np.array_equal(np.sort(seen.flatten().numpy()), np.sort(stream))
    assert dataset.train.tokens - len(stream) <= 16


def test_validation_comes_from_the_other_side(dataset):
    windows = validation_windows(dataset, context=8, limit=None)
    stream = dataset.validation.read(0, dataset.validation.tokens).astype(np.int64)
    inputs, targets = windows.batch(range(windows.count))
    assert inputs.flatten().tolist() == stream[: inputs.numel()].tolist()
    assert targets.flatten().tolist() == stream[1 : 1 + inputs.numel()].tolist()
