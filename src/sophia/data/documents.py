"""Documents out of plain text: where one ends and the next begins."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from sophia.data.blocks import Block, read_blocks

LONGEST_DOCUMENT = 1 << 18
"""Bytes beyond which any document is cut into several: encoding takes a worker a hundred times the memory."""
BOM = b"\xef\xbb\xbf"
INVALID_REMEDY = "correct it, or continue with --invalid-utf8 replace"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_ESCAPES = {r"\0": "\0", r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


class Piece(NamedTuple):
    """One document, or a part of one that is too long and so counts as a document of its own."""

    text: bytes
    """Valid UTF-8; empty for a record without text."""
    position: int
    """Bytes of the source read so far, for progress."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How sources are taken apart."""

    text_field: str = "text"
    """The field of a record (JSON lines, parquet, Hugging Face) that holds its text."""
    document_separator: str = ""
    r"""In plain text: what stands between documents, such as '<|endoftext|>', '\n\n\n' or '\0'. Empty: nothing does."""
    document_bytes: int = 1 << 16
    """In plain text without a separator: a longer file is cut into documents of at most this many bytes."""
    invalid_utf8: Literal["error", "replace"] = "error"
    """What to do with bytes that are no text in UTF-8: stop and name them, or put U+FFFD in their place."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot work."""
        if not 16 <= self.document_bytes <= LONGEST_DOCUMENT:
            raise ValueError(
                f"document_bytes is {self.document_bytes}; it must lie between 16 and {LONGEST_DOCUMENT}, "
                "because a document is tokenized whole"
            )


def text_documents(path: Path, reading: Reading) -> Iterator[Piece]:
    """Documents of a plain text file, in bounded memory whatever its size.

    Without a separator a file is one document; a file longer than ``reading.document_bytes`` is cut (see ``cut``) and
    its documents joined are the file. With a separator the documents are what stands between, without the line ends
    beside it; only those beyond ``LONGEST_DOCUMENT`` are cut.

    Raises:
        ValueError: Binary, or not UTF-8: names the file and the byte.
    """
    if reading.document_separator:
        pieces = _separated(read_blocks(path), unescape(reading.document_separator).encode())
    else:
        pieces = _cut_stream(read_blocks(path), reading.document_bytes)
    offset = 0  # of the piece in the (decompressed) file
    for taken, raw, position in pieces:
        text = _checked(raw, path, offset, reading)
        if offset == 0:
            text = text.removeprefix(BOM)
        if text:
            yield Piece(text, position)
        offset += taken


def cut(text: bytes, limit: int) -> Iterator[bytes]:
    """Cut a text into pieces of at most ``limit`` bytes that joined are the text.

    A cut is made behind the last blank line of a piece's second half; else behind a line, before a space, or at least
    between two characters.
    """
    begin = 0
    while len(text) - begin > limit:
        end = _cut_at(text, begin, limit)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def unescape(separator: str) -> str:
    r"""A separator from the command line: ``\0``, ``\n``, ``\r``, ``\t`` and ``\\`` mean what they mean in Python."""
    return re.sub(r"\\[0nrt\\]", lambda match: _ESCAPES[match.group()], separator)


class _Part(NamedTuple):
    taken: int  # bytes of the file, with what is dropped
    text: bytes
    position: int


def _cut_at(text: bytes | bytearray, begin: int, limit: int) -> int:
    half, end = begin + limit // 2, begin + limit
    for mark, behind in ((b"\n\n", 2), (b"\n\r\n", 3), (b"\n", 1), (b" ", 0)):
        found = text.rfind(mark, half, end)
        if found >= 0:
            return found + behind
    for place in range(end, end - 4, -1):
        if text[place] & 0xC0 != 0x80:  # no byte inside a character
            return place
    return end  # not UTF-8, which `_checked` will say


def _cut_stream(blocks: Iterable[Block], limit: int) -> Iterator[_Part]:
    """``cut`` for a text that arrives in blocks, whatever their sizes."""
    rest = bytearray()
    position = 0
    for data, position in blocks:
        rest += data
        begin = 0
        while len(rest) - begin > limit:
            end = _cut_at(rest, begin, limit)
            yield _Part(end - begin, bytes(rest[begin:end]), position)
            begin = end
        del rest[:begin]
    yield _Part(len(rest), bytes(rest), position)


def _separated(blocks: Iterable[Block], separator: bytes) -> Iterator[_Part]:
    rest = bytearray()
    searched = position = 0
    is_start = True  # of a document; not so behind a cut
    for data, position in blocks:
        rest += data
        begin = 0
        while True:
            found = rest.find(separator, max(begin, searched))
            if found < 0 and len(rest) - begin <= LONGEST_DOCUMENT + len(separator):
                break
            is_end = 0 <= found <= begin + LONGEST_DOCUMENT
            end = found if is_end else _cut_at(rest, begin, LONGEST_DOCUMENT)
            taken = end + len(separator) * is_end
            yield from _trimmed(bytes(rest[begin:end]), taken - begin, position, is_start=is_start, is_end=is_end)
            begin, is_start = taken, is_end
        del rest[:begin]
        searched = max(0, len(rest) - len(separator) + 1)  # a separator may lie across two blocks
    *parts, last = cut(bytes(rest), LONGEST_DOCUMENT)
    for text in parts:
        yield from _trimmed(text, len(text), position, is_start=is_start, is_end=False)
        is_start = False
    yield from _trimmed(last, len(last), position, is_start=is_start, is_end=True)


def _trimmed(text: bytes, taken: int, position: int, *, is_start: bool, is_end: bool) -> Iterator[_Part]:
    """A separated document, or a part of one, without the line ends around the whole."""
    begin = len(text) - len(text.lstrip(b"\r\n")) if is_start else 0
    yield _Part(begin, b"", position)
    text = text[begin:]
    yield _Part(taken - begin, text.rstrip(b"\r\n") if is_end else text, position)


def _checked(text: bytes, path: Path, offset: int, reading: Reading) -> bytes:
    """The text as valid UTF-8."""
    if offset == 0 and text.startswith(_UTF16):
        raise ValueError(f"{path} is UTF-16, not UTF-8; convert it with: iconv -f UTF-16 -t UTF-8")
    if reading.invalid_utf8 == "replace":
        return text.decode(errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}").encode()
    if b"\0" in text:
        byte = offset + text.index(b"\0")
        raise ValueError(
            f"{path} is a binary file (zero byte at offset {byte}); leave it out, or extract its text; if zero bytes "
            "stand between its documents: --document-separator '\\0'"
        )
    try:
        text.decode()
    except UnicodeDecodeError as problem:
        byte = offset + problem.start
        raise ValueError(
            f"{path} is not UTF-8 (byte {text[problem.start]:#04x} at offset {byte}); {INVALID_REMEDY}"
        ) from None
    return text
