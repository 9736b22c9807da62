"""A folder that one process at a time works in."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes out of one folder
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def occupied(folder: Path, doing: str) -> Iterator[None]:
    """Keep other processes out of a folder as long as the context lasts; a kill ends it, too.

    Args:
        folder: Where `.lock` is made.
        doing: For the other process's error, for example "the run is being trained".

    Raises:
        ValueError: Another process is at it.
        OSError: The folder cannot be written.
    """
    # The file stays: were it removed, two processes could each hold a lock on a file of this name.
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            _lock(handle, doing)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, doing: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 200).decode(errors="replace") or "another process"
        raise ValueError(f"{doing} by {owner}: wait for its end, or stop it first") from None
    except OSError:
        return  # a network file system without locks
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
