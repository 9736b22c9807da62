"""The tokens of one shard, read by position.

Not through a memory map: a file that is cut short while a run reads it, or a disk that fails, would end the process
without a word (SIGBUS). A read of this kind costs no more than one from a map.
"""

import os
import weakref
from pathlib import Path

import numpy as np

from sophia.data.header import SIZE, Header
from sophia.data.shard_writer import TokenArray

_CAN_READ_BY_POSITION = hasattr(os, "pread")  # not on Windows


class TokenFile:
    """An open shard; it is closed when nothing refers to it. Any number of threads and forks may read."""

    def __init__(self, path: Path, header: Header) -> None:
        """Open it.

        Raises:
            ValueError: It is gone.
            OSError: It cannot be opened.
        """
        self._path, self._header = path, header
        if not path.is_file():
            raise ValueError(f"{path} is gone since the data was opened; put it back, or prepare the data again")
        if _CAN_READ_BY_POSITION:
            self._handle = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)

    def __len__(self) -> int:
        return self._header.tokens

    def read(self, start: int, count: int) -> TokenArray:
        """Tokens from number ``start``: [count].

        Raises:
            ValueError: The file has become shorter.
            OSError: The disk fails.
        """
        dtype = self._header.dtype
        place = SIZE + start * dtype.itemsize
        tokens: TokenArray
        if _CAN_READ_BY_POSITION:
            data = self._bytes(place, count * dtype.itemsize)
            tokens = np.frombuffer(data, dtype, count=len(data) // dtype.itemsize)
        else:
            tokens = np.fromfile(self._path, dtype, count=count, offset=place)
        if len(tokens) != count:
            raise ValueError(
                f"{self._path} has become shorter since it was opened; put the original back, or prepare the data again"
            )
        return tokens

    def _bytes(self, place: int, count: int) -> bytes:
        try:
            data = os.pread(self._handle, count, place)
            while 0 < len(data) < count and (more := os.pread(self._handle, count - len(data), place + len(data))):
                data += more  # systems read 2 GiB at most
        except OSError as problem:
            raise OSError(problem.errno, problem.strerror, str(self._path)) from None
        return data
