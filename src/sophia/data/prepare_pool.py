"""The workers of `sophia prepare`, and what keeps their answers in order."""

import os
import pickle
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from sophia.data import prepare_worker
from sophia.data.shard_writer import TokenArray


class Documents(NamedTuple):
    """Documents of one split as they come from a worker."""

    tokens: TokenArray
    """The documents one after the other, an end-of-text token before each."""
    lengths: list[int]
    """Tokens of each document."""
    text_bytes: list[int]
    """UTF-8 bytes of each."""


class Encoded(NamedTuple):
    """What a worker made of one batch."""

    splits: dict[str, Documents]
    lowest: float
    """The smallest `prepare_worker.place` of a document, for advice on the validation fraction."""
    highest: float


class Pool:
    """Processes that encode batches of documents. A context manager; leaving it ends the processes."""

    def __init__(
        self,
        *,
        tokenizer: Path,
        end_of_text: int,
        dtype: np.dtype[Any],
        validation_fraction: float,
        plain_bytes: bool,
        workers: int,
    ) -> None:
        """Start the workers.

        Args:
            tokenizer: Its tokenizer.json.
            end_of_text: Id of the token that goes before each document.
            dtype: Of the tokens.
            validation_fraction: Documents whose place is below it are validation.
            plain_bytes: The tokenizer's ids are the bytes themselves, so nobody needs to ask it.
            workers: How many processes.
        """
        self._settings = {
            "tokenizer": str(tokenizer),
            "end_of_text": end_of_text,
            "typecode": dtype.char,
            "validation_fraction": validation_fraction,
            "bytes": plain_bytes,
        }
        self._dtype = dtype.newbyteorder("=")
        self._processes = [self._start() for _ in range(workers)]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)
        # A thread for each process writes its requests and waits for its answers, so neither can block the other.
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="sophia-prepare")

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def encode(self, batches: Iterable[tuple[Any, list[bytes]]]) -> Iterator[tuple[Any, Encoded]]:
        """Encode batches ``(anything, texts)``; yields ``(anything, encoded)`` in the same order.

        Reads only a few batches ahead.

        Raises:
            ValueError: The tokenizer cannot encode a text, or a worker died.
        """
        waiting: deque[tuple[Any, Future[Encoded]]] = deque()
        for tag, texts in batches:
            waiting.append((tag, self._threads.submit(self._ask, texts)))
            if len(waiting) > 2 * len(self._processes):
                yield self._first(waiting)
        while waiting:
            yield self._first(waiting)

    @staticmethod
    def _first(waiting: "deque[tuple[Any, Future[Encoded]]]") -> tuple[Any, Encoded]:
        tag, future = waiting.popleft()
        return tag, future.result()

    def _start(self) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            [sys.executable, str(prepare_worker.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},  # the processes are the parallelism
        )
        assert process.stdin is not None
        pickle.dump(self._settings, process.stdin, pickle.HIGHEST_PROTOCOL)
        return process

    def _ask(self, texts: list[bytes]) -> Encoded:
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(texts, process.stdin, pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            raise ValueError(
                f"a worker ended with exit code {process.wait()} (-9: killed, likely for want of memory); give "
                " the same command again to continue, perhaps with fewer --workers"
            ) from None
        finally:
            self._idle.put(process)  # even a dead one: whoever waits for a process must get an answer
        if isinstance(answer, str):
            raise ValueError(f"the tokenizer cannot encode {texts[0][:40]!r} or a text soon after it: {answer}")
        splits = {split: self._documents(*answer[split]) for split in ("train", "validation")}
        return Encoded(splits, answer["lowest"], answer["highest"])

    def _documents(self, tokens: bytes, lengths: list[int], text_bytes: list[int]) -> Documents:
        documents = Documents(np.frombuffer(tokens, dtype=self._dtype), lengths, text_bytes)
        ends = int(np.count_nonzero(documents.tokens == self._settings["end_of_text"]))
        if ends != len(lengths):
            raise ValueError(
                f"{ends - len(lengths)} end-of-text tokens came out of the texts themselves, so documents would fall "
                "apart; name a token by --end-of-text that no text contains"
            )
        return documents
