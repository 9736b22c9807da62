"""A data folder: token shards, their manifest and their tokenizer.

    manifest.json         what is here, with a checksum of every shard
    tokenizer.json        as `tokenizers.Tokenizer.from_file` loads it
    train-00000.tokens    a header, the tokens, the documents' starts
    validation-00000.tokens

Every document is preceded by the end-of-text token; the starts point at it. Shards hold whole documents, and the
shards of a split together are one long row of tokens, which is how they are read here.
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from sophia.data.header import SIZE, Header, dtype_for, read_header
from sophia.data.manifest import TOKENIZER, Manifest, Shard, read_manifest
from sophia.data.shard_writer import SplitWriter, TokenArray, payload_sha256
from sophia.data.token_file import TokenFile

# Each holds a file descriptor, of which a process has about a thousand.
_OPEN_SHARDS = 256

SHARD_TOKENS = 1 << 27
"""Tokens after which a shard is closed: 256 MiB of 16-bit tokens."""


class Split:
    """The tokens of one side, training or validation, as one long row. They stay on disk."""

    def __init__(self, folder: Path, shards: Iterable[Shard], headers: Iterable[Header]) -> None:
        self.shards = tuple(shards)
        self.tokens = sum(shard.tokens for shard in self.shards)
        self.documents = sum(shard.documents for shard in self.shards)
        self.text_bytes = sum(shard.text_bytes for shard in self.shards)
        """UTF-8 bytes of the texts, for bits per byte."""
        self._paths = [folder / shard.name for shard in self.shards]
        self._headers = tuple(headers)
        self.dtype = self._headers[0].dtype if self._headers else np.dtype("<u2")
        self._ends = np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)  # [shards]
        self._file = lru_cache(maxsize=_OPEN_SHARDS)(self._open)

    @cached_property
    def document_starts(self) -> npt.NDArray[np.int64]:
        """Where each document begins, at its end-of-text token: int64 [documents]. Read when first asked for."""
        out = np.zeros(self.documents, dtype=np.int64)
        done, first = 0, 0
        for path, header in zip(self._paths, self._headers, strict=True):
            starts = np.fromfile(path, np.dtype("<u8"), offset=header.starts_at)
            out[done : done + len(starts)] = starts.astype(np.int64) + first
            done, first = done + len(starts), first + header.tokens
        return out

    def read(self, start: int, stop: int) -> TokenArray:
        """Tokens ``start`` to ``stop`` as a copy in the shards' own dtype: [stop - start].

        Raises:
            ValueError: Not all of them exist.
        """
        out = np.empty(max(stop - start, 0), dtype=self.dtype)
        self._copy(start, stop, out)
        return out

    def windows(self, starts: npt.NDArray[np.integer[Any]], length: int) -> npt.NDArray[np.int64]:
        """Equally long stretches of tokens: int64 [len(starts), length].

        Raises:
            ValueError: A window leaves the split.
        """
        out = np.empty((len(starts), length), dtype=np.int64)
        for row, start in zip(out, starts.tolist(), strict=True):
            self._copy(start, start + length, row)
        return out

    def _copy(self, start: int, stop: int, out: npt.NDArray[Any]) -> None:
        if not 0 <= start <= stop <= self.tokens:
            raise ValueError(f"tokens {start} to {stop} were asked for, but the split holds {self.tokens}")
        done = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while done < stop - start:
            tokens = self._file(shard)
            begin = start + done - (int(self._ends[shard]) - len(tokens))
            count = min(len(tokens) - begin, stop - start - done)
            out[done : done + count] = tokens.read(begin, count)
            done += count
            shard += 1

    def _open(self, shard: int) -> TokenFile:
        return TokenFile(self._paths[shard], self._headers[shard])


class Dataset:
    """An opened data folder. Make one with ``sophia prepare`` or ``write_dataset``; open it with ``Dataset.open``."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        """SHA-256 over the tokenizer's and all shards' checksums, as hexadecimal."""
        self.vocab_size = manifest.vocab_size
        self.end_of_text = manifest.end_of_text
        self.train = self._split(manifest.train)
        self.validation = self._split(manifest.validation)

    @classmethod
    def open(cls, folder: Path) -> "Dataset":
        """Open a folder; manifest, tokenizer, headers and file sizes are checked, the tokens themselves are not read.

        Raises:
            ValueError: Unfinished, damaged, or put together from different data; the line names the file.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        tokenizer = folder / TOKENIZER
        if not tokenizer.is_file():
            raise ValueError(f"{tokenizer} is missing; prepare the data again")
        if hashlib.sha256(tokenizer.read_bytes()).hexdigest() != manifest.tokenizer_sha256:
            raise ValueError(f"{tokenizer} is not the tokenizer that made these shards; prepare the data again")
        return cls(folder, manifest)

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that made the shards."""
        return Tokenizer.from_file(str(self.folder / TOKENIZER))

    def verify(self, report: Callable[[Shard], None] = lambda _: None) -> None:
        """Read everything and check it: checksums, that ids are of the vocabulary, where documents start.

        Args:
            report: Called after each shard, for progress.

        Raises:
            ValueError: Names every damaged shard.
        """
        problems = []
        for shard in (*self.train.shards, *self.validation.shards):
            problem = self._problem(shard)
            if problem:
                problems.append(problem)
            report(shard)
        if problems:
            raise ValueError(f"{'; '.join(problems)}; prepare the data again")

    def _problem(self, shard: Shard) -> str | None:
        path = self.folder / shard.name
        if payload_sha256(path) != shard.sha256:
            return f"{path} is damaged (its checksum differs)"
        header = read_header(path)
        tokens = np.memmap(path, header.dtype, mode="r", offset=SIZE, shape=(header.tokens,))
        if int(tokens.max()) >= self.vocab_size:
            return f"{path} holds token {int(tokens.max())}, but the vocabulary has {self.vocab_size}"
        starts = np.fromfile(path, np.dtype("<u8"), offset=header.starts_at)
        sorted_inside = (
            starts[0] == 0 and bool((np.diff(starts.astype(np.int64)) > 0).all()) and starts[-1] < len(tokens)
        )
        if not sorted_inside or (self.end_of_text is not None and bool((tokens[starts] != self.end_of_text).any())):
            return f"{path} has documents that do not start with the end-of-text token"
        return None

    def _split(self, shards: tuple[Shard, ...]) -> Split:
        return Split(self.folder, shards, [self._checked_header(shard) for shard in shards])

    def _checked_header(self, shard: Shard) -> Header:
        path = self.folder / shard.name
        if not path.is_file():
            raise ValueError(f"{path} is missing; prepare the data again")
        header = read_header(path)
        if header.tokenizer_sha256 != self.manifest.tokenizer_sha256:
            raise ValueError(f"{path} was made with another tokenizer than this folder's; prepare the data again")
        if header.vocab_size != self.vocab_size or header.dtype != dtype_for(self.vocab_size):
            raise ValueError(
                f"{path} stores a vocabulary of {header.vocab_size} in {8 * header.dtype.itemsize} bits, but the "
                f"manifest says {self.vocab_size}; prepare the data again"
            )
        claimed = (header.tokens, header.documents, header.text_bytes, header.payload_sha256)
        if claimed != (shard.tokens, shard.documents, shard.text_bytes, shard.sha256):
            raise ValueError(f"{path} is not the shard that the manifest names; prepare the data again")
        return header


def write_dataset(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    train: Iterable[npt.ArrayLike],
    validation: Iterable[npt.ArrayLike],
    end_of_text: str | None = "<|endoftext|>",
    shard_tokens: int = SHARD_TOKENS,
) -> Dataset:
    """Write documents that are tokens already.

    Args:
        folder: Made if it is not there; must be empty.
        tokenizer: Stored with the data; also decodes the documents, to count the bytes of their texts.
        train: One array of ids [length] a document, without end-of-text tokens.
        validation: The same for the other side; may be empty.
        end_of_text: The token put before each document; None puts none.
        shard_tokens: A shard is closed by the first document that reaches this.

    Raises:
        ValueError: The folder holds something, an id is not of the vocabulary, a document is empty, there are no
            training documents, or the tokenizer does not know ``end_of_text``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder for the data")
    vocab_size = vocabulary_size(tokenizer)
    separator = None if end_of_text is None else tokenizer.token_to_id(end_of_text)
    if end_of_text is not None and separator is None:
        raise ValueError(f"the tokenizer has no token {end_of_text!r}; name its own as end_of_text, or None")
    checksum = save_tokenizer(tokenizer, folder)
    shards = {}
    for name, documents in (("train", train), ("validation", validation)):
        writer = SplitWriter(
            folder,
            name,
            vocab_size=vocab_size,
            dtype=dtype_for(vocab_size),
            tokenizer_sha256=checksum,
            shard_tokens=shard_tokens,
        )
        for document in documents:
            ids = np.asarray(document)
            if ids.size == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
                raise ValueError(f"a {name} document is empty or has ids outside the vocabulary of {vocab_size}")
            text_bytes = len(tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode())
            whole = ids if separator is None else np.concatenate(([separator], ids))
            writer.write(whole.astype(dtype_for(vocab_size)), [len(whole)], [text_bytes])
        writer.finish_shard()
        writer.publish()
        shards[name] = tuple(writer.finished)
    if not shards["train"]:
        raise ValueError(f"no training documents were given for {folder}; give at least one")
    Manifest(
        vocab_size=vocab_size,
        end_of_text=separator,
        tokenizer_sha256=checksum,
        train=shards["train"],
        validation=shards["validation"],
    ).write(folder)
    return Dataset.open(folder)


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: ids of a vocabulary with gaps must fit too."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """A tokenizer as its tokenizer.json holds it."""
    return tokenizer.to_str(pretty=True).encode()


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
    """Write tokenizer.json and return its SHA-256 as hexadecimal."""
    content = tokenizer_json(tokenizer)
    (folder / TOKENIZER).write_bytes(content)
    return hashlib.sha256(content).hexdigest()
