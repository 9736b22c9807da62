"""Advancing a study: what the plan wants goes to the workers, and what they finish into the ledger."""

import time
from collections.abc import Callable

from sophia.guards import Signals
from sophia.study.evidence import named
from sophia.study.ledger import Ledger
from sophia.study.plan import Plan, plan
from sophia.study.pool import Pool
from sophia.study.progress import Progress
from sophia.study.reuse import Loan
from sophia.study.runs import RunSpec
from sophia.study.settings import Study
from sophia.study.worker import Failed, Finished, Message, Note, Step

_LOOK_SECONDS = 0.5


def advance(
    study: Study,
    ledger: Ledger,
    pool: Pool,
    progress: Progress,
    signals: Signals,
    *,
    minutes: float | None = None,
    before: Callable[[RunSpec], None] = lambda _: None,
    loan: Loan | None = None,
) -> Plan:
    """Make all runs that the study wants; ends the pool's workers.

    Args:
        study: What is wanted.
        ledger: What is finished, and will be.
        pool: Who does it.
        progress: Is told of everything.
        signals: A signal ends the work, with checkpoints of the runs in progress.
        minutes: After so many no run is begun; those in progress are finished. None: no limit.
        before: Called with each run that is about to begin, or taken.
        loan: Runs that need not be made; asked whenever the plan moves on.

    Returns:
        What there is, and what is left.

    Raises:
        ValueError: A run cannot be made; the finished ones are in the ledger.
        RuntimeError: A mistake of ours, with a worker's traceback.
    """
    until = None if minutes is None else time.monotonic() + 60 * minutes
    state = plan(study, ledger.runs)
    progress.plan(state, ledger.runs)
    for run in ledger.runs.values():
        pool.discard(run.spec)  # a kill may have come between its result and this
    try:
        while not signals.received:
            if until is None or time.monotonic() < until:
                _begin(state, pool, progress, before)
            if not pool.running:
                break
            if _take(pool.wait(_LOOK_SECONDS), ledger, pool, progress):
                if loan is not None and (taken := loan.take({spec.id for spec in pool.running})):
                    for spec in taken:
                        before(spec)
                    progress.note(f"{len(taken)} more runs taken that were made elsewhere")
                state = plan(study, ledger.runs)
                progress.plan(state, ledger.runs)
            progress.tick()
    finally:
        _take(pool.stop(), ledger, pool, progress)
    return plan(study, ledger.runs)


def _begin(state: Plan, pool: Pool, progress: Progress, before: Callable[[RunSpec], None]) -> None:
    """Give every idle worker a run."""
    begun = {spec.id for spec in pool.running}
    for spec in state.wanted:
        if not pool.idle:
            return
        if spec.id not in begun:
            before(spec)
            pool.start(spec)
            progress.begun(spec)


def _take(messages: list[Message], ledger: Ledger, pool: Pool, progress: Progress) -> bool:
    """Write down what is finished, all of it before any failure is told. Returns whether there was anything."""
    failed: Failed | None = None
    for message in messages:
        if isinstance(message, Finished):
            ledger.append(message.run)
            pool.discard(message.run.spec)
            progress.finished(message.run)
        elif isinstance(message, Step):
            progress.step(message.id, message.step)
        elif isinstance(message, Note):
            progress.told(message.id, message.text)
        elif isinstance(message, Failed):
            failed = failed or message
    if failed is not None and failed.trace:
        raise RuntimeError(f"{named(failed.spec)} failed:\n{failed.trace}")
    if failed is not None:
        raise ValueError(f"{named(failed.spec)}: {failed.text}; finished runs are kept")
    return any(isinstance(message, Finished) for message in messages)
