"""Where documents end: against rules written down the short way, and whatever blocks the bytes come in."""

import gzip
import lzma
import random

import pytest
import zstandard

from sophia.data import blocks
from sophia.data.blocks import read_blocks
from sophia.data.documents import LONGEST_DOCUMENT, Reading, cut, text_documents

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
MIXED = ("word " * 7 + "\n") * 9 + "\n" + "naïve 木 " * 40 + "\n\n" + "x" * 300 + "\r\n\r\n" + "\n" * 50 + "end"


def found(path, **reading):
    return [piece.text.decode() for piece in text_documents(path, Reading(**reading))]


def simple_cut(text, limit):
    """Characters one by one: the last good place of the second half, by kind."""
    pieces = []
    while len(text) > limit:
        ends = range(1, limit + 1)
        blank = [e for e in ends if text[:e].endswith(b"\n\n")]
        blank_dos = [e for e in ends if text[:e].endswith(b"\n\r\n")]
        line = [e for e in ends if text[:e].endswith(b"\n")]
        space = [e for e in range(limit) if text[e : e + 1] == b" "]
        whole = [e for e in ends if text[e] & 0xC0 != 0x80]
        starts = [(blank, 2), (blank_dos, 3), (line, 1), (space, 0)]
        good = [e for kind, width in starts for e in reversed(kind) if e - width >= limit // 2]
        end = good[0] if good else whole[-1]
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text]


@pytest.mark.parametrize("limit", [16, 17, 50, 64, 333, 10_000])
def test_cuts_are_where_the_rule_says(limit):
    data = MIXED.encode()
    pieces = list(cut(data, limit))
    assert b"".join(pieces) == data
    assert pieces == simple_cut(data, limit)
    assert all(len(piece) <= limit for piece in pieces)
    for piece in pieces:
        piece.decode()  # never inside a character


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_short_file_is_one_document(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESS[compression](MIXED.encode()))
    assert found(path) == [MIXED]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("block", [1, 7, 100, 1 << 20])
def test_a_long_file_is_cut_the_same_in_any_blocks(tmp_path, monkeypatch, compression, block):
    monkeypatch.setattr(blocks, "_BLOCK", block)
    monkeypatch.setattr(blocks, "_ZSTD_INPUT", block)
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESS[compression](MIXED.encode()))
    assert found(path, document_bytes=100) == [piece.decode() for piece in cut(MIXED.encode(), 100)]
    assert found(path, document_separator="木") == [part for part in MIXED.split("木") if part]


def test_positions_rise_to_the_files_size(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(random.Random(0).randbytes(3 << 20).hex().encode()))
    positions = [piece.position for piece in text_documents(path, Reading())]
    assert positions == sorted(positions)
    assert positions[0] < positions[-1] == path.stat().st_size


def test_several_compressed_parts_in_one_file(tmp_path):
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(b"one ") + compress(b"two"))
        assert b"".join(block.data for block in read_blocks(path)) == b"one two"


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "plain text"])
def test_damaged_compression_is_named(tmp_path, suffix, damage):
    path = tmp_path / f"a.txt{suffix}"
    data = bytearray(COMPRESS[suffix](random.Random(0).randbytes(5000)))
    if damage == "truncated":
        del data[-100:]
    elif damage == "flipped":
        data[0] ^= 255
    else:
        data = b"just text"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a.txt{suffix} is damaged, truncated or not"):
        list(read_blocks(path))


@pytest.mark.parametrize(
    ("separator", "text", "expected"),
    [
        ("<|endoftext|>", "one\n<|endoftext|>\ntwo<|endoftext|>", ["one", "two"]),
        ("<|endoftext|>", "<|endoftext|>one<|endoftext|><|endoftext|>\n\n<|endoftext|>two", ["one", "two"]),
        (r"\0", "one\n\0\ntwo \0 three", ["one", "two ", " three"]),
        (r"\n\n\n", "one\n\ntwo\n\n\nthree\r\n", ["one\n\ntwo", "three"]),
        ("\\\\n", r"one\ntwo", ["one", "two"]),
        ("aa", "xaaaay", ["x", "y"]),
    ],
)
def test_separators(tmp_path, separator, text, expected):
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert found(path, document_separator=separator) == expected


@pytest.mark.parametrize("block", [1000, 1 << 20])
def test_separated_documents_are_cut_only_when_huge(tmp_path, monkeypatch, block):
    monkeypatch.setattr(blocks, "_BLOCK", block)
    path = tmp_path / "a.txt"
    huge = "line of text\n" * (LONGEST_DOCUMENT // 13)  # just below the limit
    more = "x" * (LONGEST_DOCUMENT + 5)
    path.write_text(f"{huge}|{more}|end|{more}")
    expected = [huge.rstrip("\n"), more[:-5], more[-5:], "end", more[:-5], more[-5:]]
    assert found(path, document_separator="|") == expected
    path.write_text(f"\n{2 * huge}\n|\n\n{2 * huge}")  # line ends at a cut stay
    pieces = found(path, document_separator="|")
    assert len(pieces) == 4
    assert "".join(pieces) == 2 * (2 * huge).rstrip("\n")


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone|two")
    assert found(path) == ["one|two"]
    assert found(path, document_separator="|") == ["one", "two"]


@pytest.mark.parametrize("limit", [16, 100, 1 << 16])
@pytest.mark.parametrize("at", [0, 99, 5000])
def test_invalid_utf8_is_named_by_file_and_byte(tmp_path, limit, at):
    path = tmp_path / "a.txt"
    data = bytearray(b"some words \n" * 500)
    data[at] = 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"a.txt is not UTF-8 \(byte 0xff at offset {at}\).*--invalid-utf8 replace"):
        found(path, document_bytes=limit)
    replaced = "".join(found(path, document_bytes=limit, invalid_utf8="replace"))
    assert replaced == data.decode(errors="replace")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"text\0text", r"binary file \(zero byte at offset 4\).*--document-separator '\\0'"),
        ("text".encode("utf-16"), "UTF-16"),
        (b"ends in the middle of \xe6\x9c", "offset 22"),
        (b"\x7fELF\2\1\1\0\0\0", "binary file"),
        (b"\x89PNG\r\n", "not UTF-8"),
    ],
)
def test_what_is_no_text_is_named(tmp_path, data, words):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words):
        found(path)


@pytest.mark.parametrize("size", [0, 15, LONGEST_DOCUMENT + 1])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"document_bytes is {size}"):
        Reading(document_bytes=size)
