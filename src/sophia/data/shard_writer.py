"""Tokens on their way to disk: shards that grow, survive a kill, and get their header last."""

import hashlib
import os
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from sophia.data.header import SIZE, Header
from sophia.data.manifest import Shard

TokenArray = npt.NDArray[np.unsignedinteger[Any]]

PARTIAL = ".partial"


class SplitWriter:
    """Writes one split as a sequence of shards; a document is never divided between two.

    While a shard grows its file is ``NAME.partial`` and its header is zeros. ``finish_shard`` completes the file, and
    ``publish`` gives it its name: so a caller who keeps a journal can write it between the two.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        vocab_size: int,
        dtype: np.dtype[np.uint16] | np.dtype[np.uint32],
        tokenizer_sha256: str,
        shard_tokens: int,
    ) -> None:
        self.folder = folder
        self.split = split
        self.finished: list[Shard] = []
        self._vocab_size = vocab_size
        self._dtype = dtype
        self._tokenizer_sha256 = tokenizer_sha256
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._tokens = 0  # of the open shard, as all below
        self._text_bytes = 0
        self._starts = array("Q")

    @property
    def totals(self) -> tuple[int, int, int]:
        """Tokens, documents and text bytes so far."""
        return (
            sum(shard.tokens for shard in self.finished) + self._tokens,
            sum(shard.documents for shard in self.finished) + len(self._starts),
            sum(shard.text_bytes for shard in self.finished) + self._text_bytes,
        )

    def write(self, tokens: TokenArray, lengths: Sequence[int], text_bytes: Sequence[int]) -> None:
        """Append whole documents.

        Args:
            tokens: The documents one after the other, with their end-of-text tokens: [sum of lengths].
            lengths: Tokens of each document.
            text_bytes: UTF-8 bytes of each document's text.
        """
        ends = np.cumsum(np.asarray(lengths, dtype=np.int64))  # [documents]
        sizes = np.asarray(text_bytes, dtype=np.int64)
        assert len(tokens) == (ends[-1] if len(ends) else 0)
        first, begin = 0, 0  # the next document, and its first token
        while first < len(ends):
            # The shard is full with the first document that reaches the limit.
            full = int(np.searchsorted(ends, begin + self._shard_tokens - self._tokens))
            last = min(full, len(ends) - 1)
            end = int(ends[last])
            starts = np.concatenate(([begin], ends[first:last])) - begin + self._tokens
            self._append(tokens[begin:end], starts.astype(np.uint64), int(sizes[first : last + 1].sum()))
            if self._tokens >= self._shard_tokens:
                self.finish_shard()
            first, begin = last + 1, end

    def sync(self) -> None:
        """Everything written so far survives a power failure."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish_shard(self) -> None:
        """Complete the open shard's file, if there is one; it keeps its partial name until ``publish``."""
        if self._file is None:
            return
        padding = bytes(-(self._tokens * self._dtype.itemsize) % 8)
        self._file.write(padding + np.array(self._starts, dtype="<u8").tobytes())
        self._file.flush()
        name = self._name()
        checksum = payload_sha256(self.folder / (name + PARTIAL))
        shard = Shard(
            name=name,
            tokens=self._tokens,
            documents=len(self._starts),
            text_bytes=self._text_bytes,
            sha256=checksum,
        )
        self._file.seek(0)
        self._file.write(self._header(shard).pack())
        self.sync()
        self._file.close()
        self.finished.append(shard)
        self._file, self._tokens, self._text_bytes, self._starts = None, 0, 0, array("Q")

    def publish(self) -> None:
        """Give finished shards their names. Asked again, it does nothing more."""
        for shard in self.finished:
            partial = self.folder / (shard.name + PARTIAL)
            if partial.exists():
                partial.replace(self.folder / shard.name)

    def close(self) -> None:
        """Close the open shard's file as it is; it stays partial."""
        if self._file is not None:
            with suppress(OSError):  # a full disk, which was said when it was written to
                self._file.close()
            self._file = None

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs; call ``sync`` first."""
        return {
            "finished": [vars(shard) for shard in self.finished],
            "open": {"tokens": self._tokens, "documents": len(self._starts), "text_bytes": self._text_bytes},
        }

    def restore(self, state: dict[str, Any], *, end_of_text: int) -> None:
        """Go back to a state, dropping what was written after it. Documents are found by their end-of-text tokens.

        Raises:
            ValueError: The files do not hold what the state says.
        """
        self.finished = [Shard(**shard) for shard in state["finished"]]
        self.publish()
        for shard in self.finished:
            if not (self.folder / shard.name).is_file():
                raise ValueError(f"{self.folder / shard.name} is gone; start over with --overwrite")
        open_shard = state["open"]
        if not open_shard["tokens"]:
            return  # files of later shards may be there; they will be begun again
        path = self.folder / (self._name() + PARTIAL)
        end = SIZE + open_shard["tokens"] * self._dtype.itemsize
        if not path.is_file() or path.stat().st_size < end:
            raise ValueError(f"{path} is shorter than the journal says; start over with --overwrite")
        self._file = path.open("r+b")
        self._file.truncate(end)
        self._file.seek(SIZE)
        tokens = np.fromfile(self._file, dtype=self._dtype)
        starts = np.flatnonzero(tokens == end_of_text)
        if len(starts) != open_shard["documents"]:
            raise ValueError(f"{path} does not hold the documents that the journal says; start over with --overwrite")
        self._starts = array("Q", starts.tolist())
        self._tokens, self._text_bytes = open_shard["tokens"], open_shard["text_bytes"]

    def _append(self, tokens: TokenArray, starts: npt.NDArray[np.uint64], text_bytes: int) -> None:
        if self._file is None:
            self._file = (self.folder / (self._name() + PARTIAL)).open("wb")
            self._file.write(bytes(SIZE))
        self._file.write(np.ascontiguousarray(tokens, dtype=self._dtype).data)
        self._starts.extend(starts.tolist())
        self._tokens += len(tokens)
        self._text_bytes += text_bytes

    def _name(self) -> str:
        return f"{self.split}-{len(self.finished):05d}.tokens"

    def _header(self, shard: Shard) -> Header:
        return Header(
            dtype=self._dtype,
            vocab_size=self._vocab_size,
            tokens=shard.tokens,
            documents=shard.documents,
            text_bytes=shard.text_bytes,
            tokenizer_sha256=self._tokenizer_sha256,
            payload_sha256=shard.sha256,
        )


def payload_sha256(path: Path) -> str:
    """SHA-256 of everything behind a shard's header, as hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(SIZE)
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
