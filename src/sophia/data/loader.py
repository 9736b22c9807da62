"""Which tokens a training step sees: a pure function of (data fingerprint, seed, step), read from shards.

The training tokens are cut into windows of ``context`` inputs; the targets lie one token further, so that neighbours
share that one token and nothing else. An epoch visits every window once, in an order that the fingerprint, the seed
and the number of the epoch draw. The first epoch's windows begin with the first token; those of each later one are
shifted by less than a window, drawn likewise, so that text that comes again is cut elsewhere and its tokens are
predicted from longer or shorter contexts than before. That costs nothing but the first few tokens of the data (the last
window is moved back to where the data ends), and in each of our pairs of small trials, of four and of eight epochs, the
validation loss ended lower with it. Rows are dealt from this endless sequence: step t has rows t * rows … t * rows +
rows - 1, so that the number of ranks, the size of micro-batches and a resume change nothing, and any step is found
without those before it.
"""

import contextlib
import hashlib
import itertools
import operator
import os
import threading
import weakref
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sophia.data.permutation import Permutation
from sophia.data.shards import Dataset, Split

_SEEDS = 1 << 64
_SIGNAL_PAUSE = 1.0  # seconds


class Batches:
    """The global batches of a run, by number.

    Example:
        >>> batches = Batches(dataset, context=1024, rows=480, seed=0)
        >>> inputs, targets = batches.step(1_000)  # each int64 [480, 1024]
        >>> inputs, targets = batches.step(1_000, range(0, 480, 8))  # every eighth row of the same batch
    """

    def __init__(self, dataset: Dataset, *, context: int, rows: int, seed: int) -> None:
        """Divide the training tokens into windows.

        Args:
            dataset: An opened data folder.
            context: Tokens in a sequence.
            rows: Sequences in a global step, over all ranks and micro-batches.
            seed: Draws the order of the windows, together with the data's fingerprint.

        Raises:
            ValueError: A setting is out of its range, or the training tokens hold no window.
        """
        if context < 1 or rows < 1:
            raise ValueError(f"context is {context} and rows is {rows}; both must be at least 1")
        if not 0 <= seed < _SEEDS:
            raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**64")
        self.dataset = dataset
        self.context = context
        self.rows = rows
        self.seed = seed
        self.windows_per_epoch = _windows(dataset.train, context, "training")

    def step(self, index: int, rows: range | Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Read rows of the global batch of data step ``index``.

        Args:
            index: Data step, from 0. Without a limit: epochs follow each other, within a step too.
            rows: Which of the global rows, 0 … rows - 1, in any order; all of them by default.

        Returns:
            Inputs and targets, each int64 [len(rows), context] on the CPU and contiguous; targets are the inputs one
            token later.

        Raises:
            ValueError: There is no such step or row.
        """
        return _pair(self.dataset.train.windows(self.starts(index, rows), self.context + 1))

    def starts(self, index: int, rows: range | Sequence[int] | None = None) -> npt.NDArray[np.int64]:
        """Tokens with which these rows begin: int64 [len(rows)].

        Raises:
            ValueError: There is no such step or row.
        """
        if index < 0:
            raise ValueError(f"data step is {index}; steps count from 0")
        chosen = range(self.rows) if rows is None else [operator.index(row) for row in rows]
        _check_inside("row", chosen, self.rows)
        dealt = index * self.rows + np.asarray(chosen, dtype=np.int64)
        epochs, places = np.divmod(dealt, self.windows_per_epoch)
        starts = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            starts[now] = self._starts_in(epoch, places[now])
        return starts

    def _starts_in(self, epoch: int, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        key = f"{self.dataset.fingerprint} {self.seed} {epoch}"
        windows = Permutation(self.windows_per_epoch, key)(places)
        shift = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") % self.context if epoch else 0
        return np.minimum(windows * self.context + shift, self.dataset.train.tokens - self.context - 1)


class Prefetcher:
    """Reads the coming steps in a background thread, so that training does not wait for the disk.

    Close it, or use it as a context manager: that ends the thread, whatever happened. An exception of the thread comes
    out of ``next`` as it is. Not for use across a fork: the child gets no thread, and is told so.

    Example:
        >>> with Prefetcher(batches, start=0, rows=range(8), device=torch.device("cpu")) as prefetcher:
        ...     inputs, targets = next(prefetcher)
    """

    def __init__(self, batches: Batches, *, start: int, rows: range, device: torch.device, depth: int = 2) -> None:
        """Begin to read.

        Args:
            batches: What to read.
            start: The first data step; nothing before it is touched.
            rows: Rows of the global batch, as in ``Batches.step``.
            device: Where the batches shall be. On the way to CUDA they are pinned and copied without waiting.
            depth: Steps that are kept ready.

        Raises:
            ValueError: There is no such step or row, or the depth is below 1.
        """
        if depth < 1:
            raise ValueError(f"the prefetcher's depth is {depth}; it must be at least 1")
        batches.starts(start, rows)  # refuses rows and start here rather than in the thread
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._device = device
        self._channel = _Channel(depth)
        self._failure: BaseException | None = None
        self._process = os.getpid()
        # The thread knows the channel, never this object: one that is merely dropped can be collected, and stops it.
        self._thread = threading.Thread(
            target=_read_ahead, args=(batches, start, rows, device, self._channel), name="prefetcher", daemon=True
        )
        weakref.finalize(self, _end, self._channel, self._thread)
        self._thread.start()

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next step in order: inputs and targets, each int64 [len(rows), context] on the device.

        Raises:
            RuntimeError: It is closed, or belongs to another process.
            BaseException: Whatever ended the thread, again on every further call.
        """
        if self._process != os.getpid():
            raise RuntimeError("a prefetcher does not survive a fork; make one in the child")
        if self._channel.stopped:
            raise RuntimeError("the prefetcher is closed")
        item = self._channel.get() if self._failure is None else self._failure
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        self._channel.wanted.release()
        if self._device.type == "cpu":
            return item  # even a copy to where it is would let the thread, just woken, go first
        pinned = self._device.type == "cuda"  # elsewhere a copy that does not wait could read memory already reused
        inputs, targets = item
        return inputs.to(self._device, non_blocking=pinned), targets.to(self._device, non_blocking=pinned)

    def close(self) -> None:
        """End the thread and forget what it has read. A second call does nothing, nor does one after a fork."""
        self._channel.stop()
        if self._process == os.getpid():
            self._thread.join()
            self._channel.ready = SimpleQueue()
            self._failure = None  # its traceback holds frames, and they batches

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Channel:
    """What the thread and its consumer share."""

    def __init__(self, depth: int) -> None:
        self.ready: SimpleQueue[tuple[Tensor, Tensor] | BaseException] = SimpleQueue()
        self.wanted = threading.Semaphore(depth)
        self.stopped = False
        self._process = os.getpid()

    def get(self) -> tuple[Tensor, Tensor] | BaseException:
        """The next item, as soon as it is there."""
        while True:
            # A signal that comes between Python's last look for one and the lock's wait is noticed only after the wait.
            with contextlib.suppress(Empty):
                return self.ready.get(timeout=_SIGNAL_PAUSE)

    def stop(self) -> None:
        self.stopped = True
        if self._process == os.getpid():  # a fork may have copied the semaphore locked
            self.wanted.release()


def _end(channel: _Channel, thread: threading.Thread) -> None:
    """What is left to do for a prefetcher that was dropped; Python would stop the thread wherever it is, and crash."""
    channel.stop()
    if thread is not threading.current_thread() and thread.is_alive():
        thread.join()


def _read_ahead(batches: Batches, start: int, rows: range, device: torch.device, channel: _Channel) -> None:
    """Body of the thread."""
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # pinning would otherwise open a context on GPU 0, from every rank
        for index in itertools.count(start):
            channel.wanted.acquire()
            if channel.stopped:
                return
            inputs, targets = batches.step(index, rows)
            if device.type == "cuda":
                inputs, targets = inputs.pin_memory(), targets.pin_memory()
            channel.ready.put((inputs, targets))
    except BaseException as failure:
        channel.ready.put(failure)


class ValidationWindows:
    """The sequences on which losses are measured: always the same, so that their differences are the model's."""

    def __init__(self, split: Split, context: int, starts: npt.NDArray[np.int64]) -> None:
        self.context = context
        self.count = len(starts)
        self.tokens = self.count * context
        """Predictions in all windows together."""
        self._split = split
        self._starts = starts  # int64 [count]

    def batch(self, windows: range | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read some of the windows 0 … count - 1: inputs and targets, each int64 [len(windows), context] on the CPU.

        A rank takes its share by ``range(rank, count, ranks)``, in slices that fit its memory.

        Raises:
            ValueError: There is no such window.
        """
        _check_inside("window", windows, self.count)
        starts = self._starts[np.asarray(windows, dtype=np.int64)]
        return _pair(self._split.windows(starts, self.context + 1))


def validation_windows(dataset: Dataset, *, context: int, limit: int | None) -> ValidationWindows:
    """Choose the evaluation windows: without overlap, evenly spread over the validation tokens.

    Args:
        dataset: An opened data folder.
        context: Tokens in a sequence.
        limit: How many windows at most; None takes all.

    Raises:
        ValueError: A setting is below 1, or the validation tokens hold no window.
    """
    if context < 1 or (limit is not None and limit < 1):
        raise ValueError(f"context is {context} and the limit of validation windows {limit}; both must be at least 1")
    available = _windows(dataset.validation, context, "validation")
    count = available if limit is None else min(limit, available)
    numbers = np.arange(count, dtype=np.int64) * available // count
    return ValidationWindows(dataset.validation, context, context * numbers)


def _windows(split: Split, context: int, side: str) -> int:
    """How many windows there are; each needs one token more than its inputs, which it shares with the next."""
    count = (split.tokens - 1) // context
    if count < 1:
        remedy = "give more text" if side == "training" else "hold back a larger share of the text for validation"
        raise ValueError(
            f"the {side} data has {split.tokens} tokens, too few for one sequence of {context} and its targets; "
            f"{remedy}, or choose a context of at most {max(split.tokens - 1, 1)}"
        )
    return count


def _check_inside(what: str, numbers: Sequence[int], count: int) -> None:
    """Numpy would take a negative number to count from the end."""
    for number in numbers:
        if not 0 <= number < count:
            raise ValueError(f"{what} {number} was asked for; there are {what}s 0 to {count - 1}")


def _pair(windows: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Split windows into inputs and targets. windows: int64 [n, context + 1] -> two of int64 [n, context]."""
    both = torch.from_numpy(windows)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
