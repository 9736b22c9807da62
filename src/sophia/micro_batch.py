"""How many sequences fit into one forward pass: found before training, and corrected when memory runs out after all."""

import contextlib
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.parallel import DistributedDataParallel

from sophia import plan
from sophia.memory import Parallel
from sophia.step import Stepper

if TYPE_CHECKING:
    from sophia.session import Session

# What the estimate may be wrong by, and what else the process needs.
_SHARE_OF_FREE_MEMORY = 0.8


def largest(stepper: Stepper, session: "Session") -> int:
    """The largest number of sequences, dividing this rank's rows, whose training step fits the device's memory.

    On CUDA it is tried; elsewhere `plan`'s estimate is held against the memory that is free.

    Raises:
        ValueError: Not even one fits.
    """
    if session.here.device.type == "cuda":
        return _tried(stepper, session)
    free = free_memory()
    if free is not None:
        free //= session.here.node_size  # whose ranks share it
    sizes = _divisors(len(stepper.rows))
    for size in sizes:
        if free is None or _estimate(session, size) <= _SHARE_OF_FREE_MEMORY * free:
            return size
    raise ValueError(
        f"a training step needs about {_estimate(session, 1) / 2**30:.1f} GiB with one sequence at a time, and "
        f"{(free or 0) / 2**30:.1f} GiB are free: choose a smaller --model or --context, or --activation-checkpointing"
    )


def free_memory() -> int | None:
    """Bytes of main memory that a new allocation can have; None where the system does not tell."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def run_within_memory(compute: Callable[[], float], session: "Session", note: Callable[[str], None]) -> float:
    """Run one step's computation; with micro_batch auto, again with half the sequences when memory runs out.

    It may be run again because it is a function of the step alone and leaves nothing but gradients, which it drops
    first.

    Raises:
        ValueError: Memory ran out, and there is nothing to halve or several ranks would have to.
    """
    stepper = session.stepper
    while True:
        try:
            return compute()
        except (torch.OutOfMemoryError, RuntimeError) as problem:
            if not _is_out_of_memory(problem):
                raise
            text = str(problem).splitlines()[0]
        size = stepper.micro_batch
        if session.settings.batch.micro_batch != "auto" or session.here.size > 1 or size == 1:
            raise ValueError(
                f"memory ran out with micro_batch {size} on {session.here.device} ({text}): resume with "
                f"{'--micro-batch ' + str(size // 2) if size > 1 else '--activation-checkpointing'}"
            )
        stepper.micro_batch = next(smaller for smaller in _divisors(len(stepper.rows)) if smaller < size)
        note(f"memory ran out with {size} sequences at a time: going on with {stepper.micro_batch}")
        _free(stepper)


def _tried(stepper: Stepper, session: "Session") -> int:
    for size in _divisors(len(stepper.rows)):
        stepper.micro_batch = size
        fits = _fits(stepper, session)
        _free(stepper)
        if all(session.here.gather(fits)):
            return size
    raise ValueError(
        f"not even one sequence of {session.config.context} tokens fits {session.here.device}: choose a smaller "
        "--model or --context, --activation-checkpointing, or more GPUs with --parallel fsdp"
    )


def _fits(stepper: Stepper, session: "Session") -> bool:
    """Whether two micro-batches can be computed here; the second one has the gradients of the first beside it.

    Under DDP without a word to the other ranks: one that runs out of memory leaves none waiting. Under FSDP2 every
    forward pass is a collective call, and ranks must have GPUs of one size to run out of memory together.
    """
    rows, device = min(2 * stepper.micro_batch, len(stepper.rows)), session.here.device
    inputs = torch.zeros(rows, session.config.context, dtype=torch.long, device=device)
    _, shards = _sharing(session)
    alone = stepper.model.no_sync() if isinstance(stepper.model, DistributedDataParallel) else contextlib.nullcontext()
    try:
        # The optimizer's tensors come with the first step: their place is kept.
        kept = plan.optimizer_bytes(session.config, session.settings.optimizer.optimizer) // shards
        reserved = torch.empty(kept, dtype=torch.uint8, device=device)
        with alone:
            stepper.gradients(inputs, inputs, index=0)
        del reserved
    except torch.OutOfMemoryError:
        return False
    return True


def _sharing(session: "Session") -> tuple[Parallel, int]:
    """How `plan` calls what the ranks do, and into how many parts it cuts what has the size of the parameters."""
    here, parallel = session.here, session.settings.machine.parallel
    if here.size == 1:
        return "none", 1
    if parallel == "ddp":
        return "ddp", 1
    return "fsdp", here.node_size if parallel == "hsdp" else here.size


def _estimate(session: "Session", size: int) -> int:
    parallel, shards = _sharing(session)
    return plan.step_memory(
        session.config,
        micro_batch=size,
        context=session.config.context,
        optimizer=session.settings.optimizer.optimizer,
        precision="fp32" if session.settings.machine.precision != "bf16" else "bf16",
        activation_checkpointing=session.config.activation_checkpointing,
        device=session.here.device.type,
        parallel=parallel,
        ranks=shards if parallel == "fsdp" else session.here.size,
    ).total


def _divisors(number: int) -> list[int]:
    return [size for size in range(number, 0, -1) if number % size == 0]


def _is_out_of_memory(problem: Exception) -> bool:
    return isinstance(problem, torch.OutOfMemoryError) or "not enough memory" in str(problem)  # the CPU's allocator


def _free(stepper: Stepper) -> None:
    stepper.optimizers.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
