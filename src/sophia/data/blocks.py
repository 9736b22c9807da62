"""The bytes of a file, block by block, whatever it is compressed with."""

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import zstandard

_BLOCK = 1 << 20
# zstd's incremental interface has no limit for its output: what goes in at once bounds it, even for a "bomb".
_ZSTD_INPUT = 1 << 12


class Block(NamedTuple):
    """Some of a file's content."""

    data: bytes
    """Decompressed, never empty."""
    position: int
    """Bytes of the file itself read so far, for progress."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def read_blocks(path: Path) -> Iterator[Block]:
    """Read a file from its beginning; .gz, .xz and .zst are decompressed on the way, in bounded memory.

    Raises:
        ValueError: The compressed data is damaged or ends too early.
        OSError: The file cannot be read.
    """
    decompress = COMPRESSIONS.get(path.suffix.lower(), _plain)
    with path.open("rb") as raw:
        try:
            for data in decompress(raw):
                yield Block(data, raw.tell())
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError) as problem:
            raise ValueError(
                f"{path} is damaged, truncated or not {path.suffix} at all ({problem}); fetch or compress it again"
            ) from None


def _plain(raw: _Readable) -> Iterator[bytes]:
    while data := raw.read(_BLOCK):
        yield data


def _gzip(raw: BinaryIO) -> Iterator[bytes]:
    with gzip.open(raw) as file:
        yield from _plain(file)


def _xz(raw: BinaryIO) -> Iterator[bytes]:
    with lzma.open(raw) as file:
        yield from _plain(file)


def _zstd(raw: BinaryIO) -> Iterator[bytes]:
    # Not `stream_reader`, which takes a frame that stops in the middle for the end of the file.
    frame = None
    while data := raw.read(_ZSTD_INPUT):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            out = frame.decompress(data)
            if out:
                yield out
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
    if frame is not None:
        raise EOFError("the last frame is incomplete")


COMPRESSIONS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {".gz": _gzip, ".xz": _xz, ".zst": _zstd}
"""Suffix -> reader of decompressed blocks."""
