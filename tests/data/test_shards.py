"""The file format: what goes in comes out, across shards; and nothing that is damaged is opened."""

import json
import zlib

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from sophia.cli import main
from sophia.data.header import SIZE, dtype_for, read_header
from sophia.data.shards import Dataset, write_dataset
from sophia.data.tokenizer import byte_tokenizer

WORDS = {f"w{i}": i for i in range(69_999)} | {"<|endoftext|>": 69_999}


def documents(count, *, largest=256, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, largest, size=generator.integers(1, 40)) for _ in range(count)]


def row(parts, separator):
    return [int(token) for part in parts for token in ([] if separator is None else [separator]) + part.tolist()]


@pytest.fixture
def folder(tmp_path):
    write_dataset(
        tmp_path / "data", byte_tokenizer(), train=documents(30), validation=documents(4, seed=1), shard_tokens=100
    )
    return tmp_path / "data"


@pytest.mark.parametrize("shard_tokens", [1, 37, 100, 10_000])
@pytest.mark.parametrize("end_of_text", ["<|endoftext|>", None])
def test_what_goes_in_comes_out(tmp_path, shard_tokens, end_of_text):
    train, validation = documents(30), documents(4, seed=1)
    dataset = write_dataset(
        tmp_path,
        byte_tokenizer(),
        train=iter(train),
        validation=iter(validation),
        end_of_text=end_of_text,
        shard_tokens=shard_tokens,
    )
    dataset.verify()
    separator = 256 if end_of_text else None
    for split, parts in ((dataset.train, train), (dataset.validation, validation)):
        expected = row(parts, separator)
        assert split.tokens == len(expected)
        assert split.documents == len(parts)
        whole = split.read(0, split.tokens)
        assert whole.dtype == np.uint16
        assert whole.tolist() == expected
        lengths = [len(part) + (separator is not None) for part in parts]
        assert split.document_starts.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()
        for shard in split.shards[:-1]:
            assert shard.tokens >= shard_tokens
    assert dataset.end_of_text == separator
    assert dataset.vocab_size == 257
    assert dataset.tokenizer().to_str() == byte_tokenizer().to_str()


def test_text_bytes_are_those_of_the_texts(tmp_path):
    texts = ["naïve", "木", "plain"]
    dataset = write_dataset(tmp_path, byte_tokenizer(), train=[list(text.encode()) for text in texts], validation=[])
    assert dataset.train.text_bytes == sum(len(text.encode()) for text in texts)
    assert dataset.validation.tokens == dataset.validation.documents == dataset.validation.text_bytes == 0
    assert dataset.validation.read(0, 0).tolist() == []
    assert dataset.validation.document_starts.tolist() == []


def test_windows_are_slices_of_the_whole(folder):
    split = Dataset.open(folder).train
    assert len(split.shards) > 3
    whole = split.read(0, split.tokens).astype(np.int64)
    for length in (1, 7, 99, 250, split.tokens):
        starts = np.arange(split.tokens - length + 1)
        windows = split.windows(starts, length)
        assert windows.dtype == np.int64
        assert np.array_equal(windows, np.lib.stride_tricks.sliding_window_view(whole, length))
    assert split.windows(np.array([], dtype=np.int64), 5).shape == (0, 5)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 10**6), (5, 4)])
def test_tokens_that_do_not_exist_are_refused(folder, start, stop):
    with pytest.raises(ValueError, match="the split holds"):
        Dataset.open(folder).train.read(start, stop)


def test_large_vocabularies_take_32_bits(tmp_path):
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="w0"))
    ids = [0, 65_535, 65_536, 69_998]
    dataset = write_dataset(tmp_path, tokenizer, train=[ids], validation=[])
    assert dataset.train.read(0, 5).dtype == np.uint32
    assert dataset.train.read(0, 5).tolist() == [69_999, *ids]
    assert [dtype_for(n).itemsize for n in (1, 65_536, 65_537)] == [2, 2, 4]
    with pytest.raises(ValueError, match="does not fit"):
        dtype_for((1 << 32) + 1)


def test_fingerprint_is_of_the_content(tmp_path):
    def fingerprint(name, **changes):
        arguments = {"train": documents(5), "validation": documents(2, seed=1)} | changes
        return write_dataset(tmp_path / name, byte_tokenizer(), **arguments).fingerprint

    first = fingerprint("a")
    assert fingerprint("b") == first
    assert fingerprint("c", train=documents(5, seed=3)) != first
    assert fingerprint("d", train=documents(2, seed=1), validation=documents(5)) != first


def test_the_layout_is_what_the_format_says(folder):
    """Read with nothing but struct offsets, as another program would."""
    data = (folder / "train-00000.tokens").read_bytes()
    assert data[:8] == b"sophtok\n"
    version, width = np.frombuffer(data, "<u4", count=2, offset=8)
    vocab, tokens, count, _ = (int(n) for n in np.frombuffer(data, "<u8", count=4, offset=16))
    assert (version, width, vocab) == (1, 2, 257)
    ids = np.frombuffer(data, "<u2", count=tokens, offset=128)
    starts = np.frombuffer(data[-8 * count :], "<u8")
    assert np.array_equal(np.flatnonzero(ids == 256), starts)
    assert np.frombuffer(data, "<u4", count=1, offset=124)[0] == zlib.crc32(data[:124])


def rewrite(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def flip(position):
    def change(data):
        data[position] ^= 4

    return change


def truncate(data):
    del data[-3:]


def sign(data):
    """A header that was changed on purpose, with its checksum right."""
    data[124:128] = zlib.crc32(data[:124]).to_bytes(4, "little")


def version_9(data):
    data[8] = 9
    sign(data)


def vocabulary_too_large(data):
    data[16:24] = (70_000).to_bytes(8, "little")
    sign(data)


def another_vocabulary(data):
    data[16:24] = (300).to_bytes(8, "little")
    sign(data)


def other_tokenizer(data):
    data[48:80] = bytes(32)
    sign(data)


DAMAGES = {
    "truncated": (truncate, ["truncated"]),
    "header only": (lambda data: data.__delitem__(slice(60, None)), ["truncated inside its header"]),
    "empty": (lambda data: data.clear(), ["not a token shard"]),
    "not ours": (lambda data: data.__setitem__(slice(0, 4), b"\x89PNG"), ["not a token shard"]),
    "bit flipped in the header": (flip(30), ["damaged header"]),
    "longer": (lambda data: data.extend(b"more"), ["too long"]),
    "another version": (version_9, ["version 9"]),
    "vocabulary larger than the dtype": (vocabulary_too_large, ["16 bits, too few", "70000"]),
    "another vocabulary": (another_vocabulary, ["vocabulary of 300", "manifest says 257"]),
    "another tokenizer": (other_tokenizer, ["another tokenizer"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen_at_opening(folder, damage, capsys):
    change, words = DAMAGES[damage]
    rewrite(folder / "train-00001.tokens", change)
    with pytest.raises(ValueError, match=r"prepare the data again|this sophia reads") as refused:
        Dataset.open(folder)
    assert main(["prepare", "--verify", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error == f"sophia: {refused.value}\n"
    assert error.count("\n") == 1
    assert all(word in error for word in [*words, "train-00001.tokens"])


@pytest.mark.parametrize("position", [SIZE, SIZE + 101, -1])
def test_a_flipped_bit_in_the_data_is_found_by_verify(folder, position, capsys):
    assert main(["prepare", "--verify", str(folder)]) == 0
    rewrite(folder / "validation-00000.tokens", flip(position))
    dataset = Dataset.open(folder)  # cheap: reads no tokens
    with pytest.raises(ValueError, match=r"validation-00000.tokens is damaged"):
        dataset.verify()
    capsys.readouterr()
    assert main(["prepare", "--verify", "--out", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "validation-00000.tokens is damaged" in error
    assert "train" not in error
    assert error.count("\n") == 1


def test_verify_names_every_bad_shard(folder):
    for name in ("train-00000.tokens", "train-00002.tokens"):
        rewrite(folder / name, flip(SIZE + 1))
    with pytest.raises(ValueError, match=r"train-00000.tokens is damaged.*train-00002.tokens is damaged"):
        Dataset.open(folder).verify()


def test_a_shard_of_another_folder_is_refused(folder, tmp_path):
    other = tmp_path / "other"
    write_dataset(other, byte_tokenizer(), train=documents(30, seed=5), validation=[], shard_tokens=100)
    (other / "train-00000.tokens").replace(folder / "train-00000.tokens")
    with pytest.raises(ValueError, match=r"train-00000.tokens is not the shard that the manifest names"):
        Dataset.open(folder)


def test_another_tokenizer_in_the_folder_is_refused(folder):
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    with pytest.raises(ValueError, match="not the tokenizer that made these shards"):
        Dataset.open(folder)


@pytest.mark.parametrize("name", ["train-00002.tokens", "tokenizer.json", "manifest.json"])
def test_a_deleted_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name):
        Dataset.open(folder)


def test_a_manifest_that_was_edited_is_refused(folder):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    for change in ({"fingerprint": "0"}, {"version": 99}, {"format": "x"}, {"train": [{}]}, {"train": 3}):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=r"manifest.json is not a manifest"):
            Dataset.open(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is not a manifest"):
        Dataset.open(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": []}, "no training documents"),
        ({"train": [[]]}, "empty"),
        ({"train": [[257]]}, "outside the vocabulary of 257"),
        ({"train": [[-1]]}, "outside the vocabulary"),
        ({"end_of_text": "</s>"}, "no token '</s>'"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        write_dataset(tmp_path / "new", byte_tokenizer(), **({"train": [[1]], "validation": []} | changes))


def test_a_folder_with_something_in_it_is_not_written_to(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match="is not empty"):
        write_dataset(folder, byte_tokenizer(), train=[[1]], validation=[])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_headers_carry_the_counts(folder):
    for split in (Dataset.open(folder).train, Dataset.open(folder).validation):
        for shard in split.shards:
            header = read_header(folder / shard.name)
            assert (header.tokens, header.documents) == (shard.tokens, shard.documents)
            assert header.text_bytes == shard.text_bytes
            assert (folder / shard.name).stat().st_size == header.file_size
