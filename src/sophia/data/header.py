"""The first bytes of a shard: what the file claims to hold."""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = b"sophtok\n"
VERSION = 1
SIZE = 128
"""Bytes before the first token; the layout below, zeros, and the CRC-32 of all that at the end."""

# magic, version, bytes a token, vocabulary, tokens, documents, text bytes, SHA-256 of the tokenizer, of the payload
_LAYOUT = struct.Struct("<8sIIQQQQ32s32s")
_CRC = struct.Struct("<I")
_CRC_AT = SIZE - _CRC.size


@dataclass(frozen=True, kw_only=True)
class Header:
    """What one shard holds. All numbers in the file are little-endian."""

    dtype: np.dtype[np.uint16] | np.dtype[np.uint32]
    vocab_size: int
    tokens: int
    documents: int
    text_bytes: int
    tokenizer_sha256: str
    payload_sha256: str

    @property
    def starts_at(self) -> int:
        """File position of the documents' starts: behind the tokens, at a multiple of 8."""
        return SIZE + -(-self.tokens * self.dtype.itemsize // 8) * 8

    @property
    def file_size(self) -> int:
        """Bytes of the whole shard."""
        return self.starts_at + 8 * self.documents

    def pack(self) -> bytes:
        """The header as ``SIZE`` bytes."""
        head = _LAYOUT.pack(
            MAGIC,
            VERSION,
            self.dtype.itemsize,
            self.vocab_size,
            self.tokens,
            self.documents,
            self.text_bytes,
            bytes.fromhex(self.tokenizer_sha256),
            bytes.fromhex(self.payload_sha256),
        ).ljust(_CRC_AT, b"\0")
        return head + _CRC.pack(zlib.crc32(head))


def dtype_for(vocab_size: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """The smallest type that holds every id of a vocabulary.

    Raises:
        ValueError: No type here holds it.
    """
    if vocab_size <= 1 << 16:
        return np.dtype("<u2")
    if vocab_size <= 1 << 32:
        return np.dtype("<u4")
    raise ValueError(f"a vocabulary of {vocab_size} entries does not fit the 32 bits of a token")


def read_header(path: Path) -> Header:
    """Read and check a shard's header and its file size; the tokens themselves are not read.

    Raises:
        ValueError: Not a shard, another version, damaged, or of the wrong length.
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(SIZE)
        actual_size = file.seek(0, 2)
    if not data.startswith(MAGIC):
        raise ValueError(f"{path} is not a token shard (its first bytes are {data[:8]!r}); prepare the data again")
    if len(data) < SIZE:
        raise ValueError(f"{path} is truncated inside its header ({len(data)} of {SIZE} bytes); prepare the data again")
    if _CRC.unpack_from(data, _CRC_AT)[0] != zlib.crc32(data[:_CRC_AT]):
        raise ValueError(f"{path} has a damaged header (its checksum differs); prepare the data again")
    _, version, width, vocab_size, tokens, documents, text_bytes, tokenizer, payload = _LAYOUT.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"{path} has format version {version}; this sophia reads version {VERSION}")
    if width not in (2, 4) or vocab_size > 1 << (8 * width):
        raise ValueError(
            f"{path} stores tokens in {8 * width} bits, too few for its vocabulary of {vocab_size}; "
            "prepare the data again"
        )
    header = Header(
        dtype=np.dtype("<u2") if width == 2 else np.dtype("<u4"),
        vocab_size=vocab_size,
        tokens=tokens,
        documents=documents,
        text_bytes=text_bytes,
        tokenizer_sha256=tokenizer.hex(),
        payload_sha256=payload.hex(),
    )
    if actual_size != header.file_size:
        raise ValueError(
            f"{path} has {actual_size} bytes, but its header promises {header.file_size}: it is "
            f"{'truncated' if actual_size < header.file_size else 'too long'}; prepare the data again"
        )
    return header
