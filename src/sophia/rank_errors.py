"""How the ranks of a run end when something goes wrong: all of them, with one text, and nobody waits in vain.

Under torchrun every rank is a process of its own. The same mistake would be told by each of them; an error of one would
leave the others in a collective call that never ends. So a rank that ends writes what it has to say into the store that
torchrun keeps, hears what the others say, and one of them tells the user: the lowest, if it does not hang.
"""

import contextlib
import functools
import io
import json
import os
import signal
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

# Seconds that a rank waits for the others to end, too. One in a collective call may learn of an end only when the
# process is gone: under gloo as its connections close, under NCCL as torchrun terminates the others. A rank that has
# nothing to tell but that it lost contact has more time: the others may be computing.
_PATIENCE_TO_TELL = 5.0
_PATIENCE_TO_LEARN = 10.0
_PAUSE = 0.02
_LOST_CONTACT = ("gloo", "nccl", "failed on rank")
_USER_ERROR = 2


class OtherRankError(ValueError):
    """The error of another rank, raised here so that this rank ends with it."""


@functools.cache
def store() -> Store:
    """What the ranks of torchrun share before, during and after their process group."""
    found: Store
    found, _, _ = next(iter(rendezvous("env://")))
    return found


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Make the errors of this block those of all ranks; a process that is alone passes them on as they are.

    Raises:
        ValueError: On the rank that tells the user; it names the ranks concerned, unless all are.
        SystemExit: On the others, with the exit code of a user's error.
    """
    if not many():
        yield
        return
    try:
        yield
    except SystemExit as end:
        if end.code:  # all is said here: wait, so that torchrun ends no rank that has not said it yet
            with contextlib.suppress(dist.DistError):
                store().add("told", 1)
            _hear("", _PATIENCE_TO_LEARN)
        raise
    except Exception as problem:
        mistake = not isinstance(problem, (ValueError, OSError)) and not _is_lost_contact(problem)
        own = _own_text(problem, mistake=mistake)
        heard = _hear(own, _PATIENCE_TO_TELL if own else _PATIENCE_TO_LEARN)
        if mistake:
            raise  # with its traceback
        if not _is_first_to_tell(heard):
            raise SystemExit(_USER_ERROR) from None
        raise ValueError(_told(heard) or _silence(heard, problem)) from None


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Only rank 0 prints, for what every rank is bound to print alike: the help, a refused argument."""
    if not many() or _rank() == 0:
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        raise ValueError(said.getvalue()) from None


def share_errors(place: str, error: Exception | None) -> None:
    """Raise on all ranks when one of them has an error; for use where they have no process group yet.

    Args:
        place: A name for this moment, used once.
        error: This rank's.

    Raises:
        The error itself on the rank that has it, OtherRankError on the others.
    """
    keys = [f"{place}/{rank}" for rank in range(_size())]
    store().set(keys[_rank()], "" if error is None else str(error))
    texts = [store().get(key).decode() for key in keys]  # waits for each
    raise_shared(error, texts)


def raise_shared(error: Exception | None, texts: list[str]) -> None:
    """Raise this rank's error, or the first of the others'; ``texts`` has one for each rank, empty where all is well.

    Raises:
        The error itself on the rank that has it, OtherRankError on the others.
    """
    if error is not None:
        raise error
    for rank, text in enumerate(texts):
        if text:
            raise OtherRankError(f"rank {rank}: {text}")


def many() -> bool:
    """Whether torchrun, or another launcher that sets its variables, started this process as one of several."""
    return "RANK" in os.environ and _size() > 1


def _rank() -> int:
    return int(os.environ["RANK"])


def _size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _own_text(problem: Exception, *, mistake: bool) -> str:
    """What this rank knows that the others may not; nothing where it only suffers from another's end."""
    if isinstance(problem, OtherRankError) or _is_lost_contact(problem):
        return ""
    return f"{type(problem).__name__}: {problem}" if mistake else str(problem)


def _is_lost_contact(problem: Exception) -> bool:
    """Whether this only says that another rank is gone; torch has no class of its own for all such errors."""
    if isinstance(problem, dist.DistError):
        return True
    return isinstance(problem, RuntimeError) and any(sign in str(problem).lower() for sign in _LOST_CONTACT)


def _hear(own: str, patience: float) -> dict[int, str]:
    """Say ``own``, and learn what all ranks say that end within so many seconds, by rank."""
    # torchrun terminates the ranks as soon as one has ended; from here on this one ends by itself.
    with contextlib.suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    heard = {_rank(): own}
    keys = {rank: f"end/{rank}" for rank in range(_size())}
    deadline = time.monotonic() + patience
    with contextlib.suppress(dist.DistError):  # the store itself is gone
        store().set(keys[_rank()], json.dumps(own))
        while time.monotonic() < deadline and not store().check(list(keys.values())):
            time.sleep(_PAUSE)
        heard |= {rank: json.loads(store().get(key)) for rank, key in keys.items() if store().check([key])}
    return heard


def _is_first_to_tell(heard: dict[int, str]) -> bool:
    """Whether it falls to this rank to tell the user; the lowest has precedence."""
    if _rank() != min(heard):
        time.sleep(10 * _PAUSE)
    with contextlib.suppress(dist.DistError):
        return store().add("told", 1) == 1
    return _rank() == min(heard)


def _told(heard: dict[int, str]) -> str:
    """The first text, with the ranks that say the same; empty where nobody knows what happened."""
    text = next((text for _, text in sorted(heard.items()) if text), "")
    if not text or sum(map(bool, heard.values())) == _size():
        return text
    ranks = sorted(rank for rank, said in heard.items() if said == text)
    more = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    return f"rank {ranks[0]}{more}: {text}"


def _silence(heard: dict[int, str], problem: Exception) -> str:
    lost = [str(rank) for rank in range(_size()) if rank not in heard]
    if lost:
        what = f"no more sign of rank {', '.join(lost)}: killed, or out of memory"
    else:
        what = f"the ranks lost each other ({str(problem).splitlines()[0]})"
    return f"{what}; --resume continues the run from its last checkpoint"
