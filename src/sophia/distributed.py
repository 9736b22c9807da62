"""The processes of a training run: one alone, or the ranks that torchrun started."""

import contextlib
import datetime
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sophia.model import GPT


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the ranks of its run."""

    rank: int
    """From 0; rank 0 writes files and talks to the user."""
    size: int
    """Number of ranks."""
    device: torch.device
    """Where this rank computes."""

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and talks."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """Sums over all ranks, in float64 where the device has it."""
        if self.size == 1:
            return list(numbers)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        totals = torch.tensor(numbers, dtype=dtype, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        if self.size == 1:
            return number
        numbers: list[int] = [0] * self.size
        dist.all_gather_object(numbers, number)
        return min(numbers)

    def share(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def agree(self, error: Exception | None) -> None:
        """Raise on all ranks when one of them has an error, so that none waits for another.

        Raises:
            The error itself on the rank that has it, ValueError with its text on the others.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return
        texts: list[str | None] = [None] * self.size
        dist.all_gather_object(texts, None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(texts):
            if text is not None:
                raise ValueError(f"rank {rank}: {text}")

    def rows(self, total: int) -> range:
        """This rank's part of the rows of a global batch.

        Raises:
            ValueError: The rows cannot be divided equally.
        """
        if total % self.size:
            raise ValueError(
                f"{total} sequences in a step cannot be divided among {self.size} ranks; choose tokens_per_step as a "
                f"multiple of {self.size} times the context, or start as many ranks as divide {total}"
            )
        share = total // self.size
        return range(self.rank * share, (self.rank + 1) * share)


@contextlib.contextmanager
def world(device: str) -> Iterator[World]:
    """Join the ranks that torchrun started, or be alone; leave the process group at the end.

    Args:
        device: "auto", "cuda", "mps" or "cpu".

    Raises:
        ValueError: This machine does not have the device.
    """
    size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    place = pick_device(device, local_rank)
    if "RANK" not in os.environ or dist.is_initialized():
        started = dist.is_available() and dist.is_initialized()
        yield World(rank=dist.get_rank() if started else 0, size=dist.get_world_size() if started else 1, device=place)
        return
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        timeout=datetime.timedelta(minutes=10),
        device_id=place if place.type == "cuda" else None,
    )
    try:
        yield World(rank=int(os.environ["RANK"]), size=size, device=place)
    finally:
        dist.destroy_process_group()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a setting names; "auto" is the fastest kind that this machine has.

    Raises:
        ValueError: There is none of this kind, or fewer than ranks.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available[name]:
        have = ", ".join(kind for kind, there in available.items() if there)
        raise ValueError(f"device {name} is not available here (torch {torch.__version__} sees: {have})")
    if name == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; start "
                "as many processes per node as it has GPUs"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device(name)


def spread(model: GPT, here: World, parallel: str, *, precision: torch.dtype) -> nn.Module:
    """Put a model under DDP or FSDP2; it stays as it is where this process is alone.

    With FSDP2 each block is a unit of its own; gradients are reduced in fp32 whatever the precision.
    """
    if here.size == 1:
        return model
    if parallel == "fsdp":
        policy = MixedPrecisionPolicy(
            param_dtype=None if precision == torch.float32 else precision, reduce_dtype=torch.float32
        )
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        return model
    devices = [here.device] if here.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def synchronized(model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """The context of a micro-batch's forward and backward: gradients are reduced with the last one only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def total_norm(norm: Tensor) -> float:
    """A gradient norm as a number, whatever the engine made of it."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
