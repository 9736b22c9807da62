"""From text to a data folder: read, encode on all cores, write, and go on after any interruption.

The result is a function of the sources and the recipe. Documents are read in order, encoded independently of each other
and written in order, so neither the number of workers nor where a batch or an interruption fell leaves a trace.
"""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from sophia.data.header import dtype_for
from sophia.data.manifest import JOURNAL, TOKENIZER, Manifest
from sophia.data.prepare_folder import claimed, clear, find_journal
from sophia.data.prepare_journal import Journal
from sophia.data.prepare_pool import Pool
from sophia.data.prepare_start import begin, identity_of, refuse_changes
from sophia.data.recipe import Recipe
from sophia.data.shard_writer import SplitWriter
from sophia.data.shards import Dataset, vocabulary_size
from sophia.data.sources import Sources
from sophia.data.tokenizer import BYTES

JOURNAL_SECONDS = 2.0
"""At most this much work, and what was read ahead, is done again after a kill."""
_BATCH_BYTES = 1 << 19


class Progress(NamedTuple):
    """How far a preparation is."""

    bytes_read: int
    bytes_total: int
    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What became of a preparation."""

    dataset: Dataset
    seconds: float
    """Of all its runs together."""
    continued: bool
    """Whether it went on from an interrupted run."""
    empty: int
    """Files in folders and records that hold no text."""


def prepare(
    sources: Sources,
    out: Path,
    recipe: Recipe,
    *,
    workers: int,
    overwrite: bool = False,
    report: Callable[[Progress], None] = lambda _: None,
    status: Callable[[str], None] = lambda _: None,
) -> Prepared:
    """Prepare a data folder, or finish one that was interrupted.

    Args:
        sources: What to read.
        out: The folder; new, or with an unfinished preparation of the same sources and recipe.
        recipe: How to read and encode it.
        workers: Processes that encode. The result does not depend on it.
        overwrite: Replace what ``sophia prepare`` wrote there before.
        report: Called with the progress after every batch.
        status: Called with a line about what comes next.

    Raises:
        ValueError: Anything wrong with sources, tokenizer or folder; the line names it and the remedy.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    with claimed(out), _full_disk_said(out):
        identity = identity_of(sources, recipe)
        journal = find_journal(out, overwrite=overwrite)
        continued = journal is not None
        if journal is None:
            journal = begin(out, sources, recipe, identity, status)
        else:
            refuse_changes(out, journal, recipe, identity)
        task = _Task(out, sources, recipe, journal)
        try:
            task.run(workers, report)
            dataset = task.finish()
        finally:
            task.close()
        return Prepared(dataset=dataset, seconds=journal.seconds, continued=continued, empty=journal.empty)


@contextmanager
def _full_disk_said(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:  # the system does not say which file it was
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"no space is left for {out}; free some, then give the same command again") from None


class _Position(NamedTuple):
    """Where reading stands behind a batch."""

    source: int
    documents: int
    empty: int
    bytes_read: int


class _Task:
    """One run of a preparation."""

    def __init__(self, out: Path, sources: Sources, recipe: Recipe, journal: Journal) -> None:
        self.out = out
        self.sources = sources
        self.recipe = recipe
        self.journal = journal
        self.empty = journal.empty
        tokenizer = Tokenizer.from_file(str(out / TOKENIZER))
        self.vocab_size = vocabulary_size(tokenizer)
        self.dtype = dtype_for(self.vocab_size)
        end_of_text = tokenizer.token_to_id(journal.end_of_text)
        assert end_of_text is not None  # the tokenizer's checksum is the one that the journal was begun with
        self.end_of_text = end_of_text
        self.writers = {
            split: SplitWriter(
                out,
                split,
                vocab_size=self.vocab_size,
                dtype=self.dtype,
                tokenizer_sha256=journal.tokenizer_sha256,
                shard_tokens=recipe.shard_tokens,
            )
            for split in ("train", "validation")
        }
        for split, state in journal.splits.items():
            self.writers[split].restore(state, end_of_text=self.end_of_text)

    def run(self, workers: int, report: Callable[[Progress], None]) -> None:
        """Read, encode and write all that is left."""
        spent, began = self.journal.seconds, time.monotonic()
        last = began
        shards = 0
        pool = Pool(
            tokenizer=self.out / TOKENIZER,
            end_of_text=self.end_of_text,
            dtype=self.dtype,
            validation_fraction=self.recipe.validation_fraction,
            plain_bytes=self.recipe.tokenizer == BYTES,
            workers=workers,
        )
        with pool:
            for position, encoded in pool.encode(self._batches()):
                for split, documents in encoded.splits.items():
                    self.writers[split].write(*documents)
                self._advance(position, encoded.lowest, encoded.highest)
                now = time.monotonic()
                self.journal.seconds = spent + now - began
                finished = sum(len(writer.finished) for writer in self.writers.values())
                if finished != shards or now - last >= JOURNAL_SECONDS:
                    self._commit()
                    last, shards = now, finished
                report(self._progress(position.bytes_read))

    def finish(self) -> Dataset:
        """Complete the last shards and write the manifest, which makes the folder a finished one."""
        self._refuse_empty_splits()
        self.journal.empty = self.empty
        for writer in self.writers.values():
            writer.finish_shard()
        self._commit()
        Manifest(
            vocab_size=self.vocab_size,
            end_of_text=self.end_of_text,
            tokenizer_sha256=self.journal.tokenizer_sha256,
            train=tuple(self.writers["train"].finished),
            validation=tuple(self.writers["validation"].finished),
            origin={"sources": list(self.sources.names), "recipe": asdict(self.recipe)},
        ).write(self.out)
        (self.out / JOURNAL).unlink()
        return Dataset.open(self.out)

    def close(self) -> None:
        """Let go of files that are still open."""
        for writer in self.writers.values():
            writer.close()

    def _progress(self, bytes_read: int) -> Progress:
        totals = [writer.totals for writer in self.writers.values()]
        documents = sum(documents for _, documents, _ in totals)
        return Progress(bytes_read, self.sources.size, documents, sum(tokens for tokens, _, _ in totals))

    def _batches(self) -> Iterator[tuple[_Position, list[bytes]]]:
        """Documents from where the journal stands, in batches of about equal work."""
        texts: list[bytes] = []
        size = 0
        empty = self.journal.empty
        first, skip = self.journal.source, self.journal.documents
        before = sum(item.size for item in self.sources.items[:first])
        for index, item in enumerate(self.sources.items[first:], start=first):
            done = skip if index == first else 0
            for piece in islice(item.documents(self.recipe.reading), done, None):
                done += 1
                if not piece.text:
                    empty += 1
                    continue
                texts.append(piece.text)
                size += len(piece.text)
                if size >= _BATCH_BYTES:
                    yield _Position(index, done, empty, before + piece.position), texts
                    texts, size = [], 0
            if not done:
                if item.must_hold_text:
                    raise ValueError(f"{item.name} is empty; leave it out")
                empty += 1
            before += item.size
        if texts:
            yield _Position(len(self.sources.items), 0, empty, before), texts
        self.empty = empty

    def _advance(self, position: _Position, lowest: float, highest: float) -> None:
        self.journal.source, self.journal.documents, self.journal.empty, _ = position
        self.journal.lowest = min(self.journal.lowest, lowest)
        self.journal.highest = max(self.journal.highest, highest)

    def _commit(self) -> None:
        """What is written stays written, whatever happens next."""
        for writer in self.writers.values():
            writer.sync()
        self.journal.splits = {split: writer.state() for split, writer in self.writers.items()}
        self.journal.write(self.out)
        for writer in self.writers.values():
            writer.publish()

    def _refuse_empty_splits(self) -> None:
        documents = {split: writer.totals[1] for split, writer in self.writers.items()}
        if all(documents.values()):
            return
        clear(self.out)  # nothing in it is of use with another fraction
        total = sum(documents.values())
        empty = next(split for split, count in documents.items() if not count)
        if not total:
            raise ValueError("the sources hold no text; name others")
        if total == 1:
            raise ValueError(
                "the sources hold a single document, and validation needs another: name more text, "
                "say what separates documents by --document-separator, or cut plain text by a smaller --document-bytes"
            )
        better = _above(self.journal.lowest) if empty == "validation" else _above(self.journal.highest) - 0.01
        raise ValueError(
            f"none of the {total} documents fell to {empty} at --validation-fraction "
            f"{self.recipe.validation_fraction:g}; name more text, or give --validation-fraction {better:g}"
        )


def _above(fraction: float) -> float:
    """The next hundredth above a fraction."""
    return (int(fraction * 100) + 1) / 100
