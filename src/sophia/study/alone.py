"""A function in a process of its own: for what only a fresh process can measure."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own.

    Raises:
        ValueError: It raised one, or an OSError; or the process died.
        RuntimeError: It raised anything else.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        kind, value = ours.recv()
    except EOFError:
        process.join()
        raise ValueError(
            f"a process that measures memory ended with exit code {process.exitcode} (-9: killed, likely for want of "
            "memory): start the study again"
        ) from None
    finally:
        process.kill()
        process.join()
    if kind == "value":
        return value
    raise (ValueError if kind == "refused" else RuntimeError)(value)


def _answer(pipe: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, too
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        pipe.send(("value", function(*arguments)))
    except (ValueError, OSError) as problem:
        pipe.send(("refused", str(problem)))
    except Exception as problem:
        pipe.send(("failed", repr(problem)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
