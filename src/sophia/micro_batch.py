"""How many sequences fit into one forward pass: found before training, and corrected when memory runs out after all."""

import contextlib
import gc
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from sophia import plan
from sophia.memory import Parallel
from sophia.step import Stepper

if TYPE_CHECKING:
    from sophia.session import Session

T = TypeVar("T")

# What the estimate may be wrong by, and what else the process needs.
_SHARE_OF_FREE_MEMORY = 0.8
# On CUDA sizes are tried, except where the estimate is beyond hope: each may be compiled first, for a minute.
_HOPE = 1.3
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
_CGROUP = Path("/sys/fs/cgroup")


def largest(stepper: Stepper, session: "Session") -> int:
    """The largest number of sequences, dividing this rank's rows, whose training step fits the device's memory.

    On CUDA it is tried; elsewhere, and under FSDP2, `plan`'s estimate is held against the memory that is free.

    Raises:
        ValueError: Not even one fits.
    """
    here, sizes = session.here, _divisors(len(stepper.rows))
    if here.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(here.device)
        available = min(here.gather(free + torch.cuda.memory_reserved(here.device)))
        # FSDP2 reduces no gradients any more after a backward pass that broke off, and does not say so.
        if not isinstance(stepper.model, FSDPModule):
            hopeful = [size for size in sizes if _estimate(session, size) <= _HOPE * available]
            return _tried(stepper, session, hopeful or sizes[-1:])
    else:
        found = free_memory()
        if found is None:
            return sizes[0]
        available = found // here.node_size  # whose ranks share it
    for size in sizes:
        if _estimate(session, size) <= _SHARE_OF_FREE_MEMORY * available:
            return size
    raise ValueError(
        f"a training step needs about {_estimate(session, 1) / 2**30:.2f} GiB with one sequence at a time, and "
        f"{available / 2**30:.2f} GiB are free: choose a smaller --model or --context, or --activation-checkpointing; "
        "--micro-batch 1 tries it all the same"
    )


def free_memory() -> int | None:
    """Bytes of main memory that this process may still take; None where the system does not tell."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(min(int(line.split()[1]) * 1024, _free_in_container()))
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def run_within_memory(compute: Callable[[], T], session: "Session", note: Callable[[str], None]) -> T:
    """Run a computation of a step; with micro_batch auto, again with fewer sequences at a time when memory runs out.

    It may be run again because it is a function of the step alone and leaves nothing but gradients, which it drops
    first.

    Raises:
        RuntimeError: Memory ran out, and there are no fewer, or several ranks would have to agree; `memory_told` says
            what helps.
    """
    stepper = session.stepper
    while True:
        size = stepper.micro_batch
        may_shrink = session.settings.batch.micro_batch == "auto" and session.here.size == 1 and size > 1
        try:
            return compute()
        except RuntimeError as problem:
            if not (may_shrink and _is_out_of_memory(problem)):
                raise
        stepper.micro_batch = _fewer(stepper)
        note(f"memory ran out with {size} sequences at a time: going on with {stepper.micro_batch}")
        _free(stepper)


@contextlib.contextmanager
def memory_told(session: "Session") -> Iterator[None]:
    """Say what helps when memory runs out in this block.

    Raises:
        ValueError: It did.
    """
    try:
        yield
    except RuntimeError as problem:
        if not _is_out_of_memory(problem):
            raise
        reason = str(problem).splitlines()[0][:150]
    else:
        return
    size = session.stepper.micro_batch
    helps = "a machine with more memory, or start a new run with a smaller --model or --context"
    if size > 1:
        helps = f"--micro-batch {_fewer(session.stepper)}"
    elif not session.config.activation_checkpointing:
        helps = "--activation-checkpointing"
    raise ValueError(
        f"memory ran out on {session.here.device} with {size} sequences at a time ({reason}): resume with {helps}"
    )


def _tried(stepper: Stepper, session: "Session", sizes: list[int]) -> int:
    for size in sizes:
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

    Without a word to other ranks: one that runs out of memory leaves none waiting.
    """
    rows, device = min(2 * stepper.micro_batch, len(stepper.rows)), session.here.device
    inputs = torch.zeros(rows, session.config.context, dtype=torch.long, device=device)
    _, shards = _sharing(session)
    alone = stepper.model.no_sync() if isinstance(stepper.model, DistributedDataParallel) else contextlib.nullcontext()
    try:
        # The optimizer's tensors come with the first step: their place is kept.
        chosen = session.settings.optimizer
        kept = (
            plan.optimizer_bytes(session.config, chosen.optimizer, chosen.state_dtype, basis=chosen.basis or "smaller")
            // shards
        )
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
        precision="bf16" if session.precision == torch.bfloat16 else "fp32",
        activation_checkpointing=session.config.activation_checkpointing,
        device=session.here.device.type,
        parallel=parallel,
        ranks=shards if parallel == "fsdp" else session.here.size,
        state_dtype=session.settings.optimizer.state_dtype,
        basis=session.settings.optimizer.basis or "smaller",
    ).total


def _divisors(number: int) -> list[int]:
    return [size for size in range(number, 0, -1) if number % size == 0]


def _fewer(stepper: Stepper) -> int:
    return next(size for size in _divisors(len(stepper.rows)) if size < stepper.micro_batch)


def _free_in_container() -> float:
    """What the limit of a container leaves; infinite where there is none."""
    try:
        limit, used = (
            (_CGROUP / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current")
        )
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return math.inf if limit == "max" else int(limit) - int(used) + int(counts["inactive_file"])
    except (OSError, ValueError, KeyError):
        return math.inf


def _is_out_of_memory(problem: Exception) -> bool:
    return isinstance(problem, torch.OutOfMemoryError) or any(sign in str(problem) for sign in _SIGNS)


def _free(stepper: Stepper) -> None:
    stepper.optimizers.zero_grad()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
