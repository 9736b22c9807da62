"""The processes of a training run: one alone, or the ranks that torchrun started."""

import contextlib
import datetime
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sophia import rank_errors
from sophia.model import GPT

T = TypeVar("T")

_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the ranks of its run."""

    rank: int
    """From 0; rank 0 writes files and talks to the user."""
    size: int
    """Number of ranks."""
    device: torch.device
    """Where this rank computes."""
    node_size: int = 1
    """Number of ranks on each node; of all ranks, where the launcher did not tell."""
    hosts: dist.ProcessGroup | None = None
    """Over which the ranks' hosts talk without their GPUs; None where there are none."""

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes and talks."""
        return self.rank == 0

    @property
    def exact(self) -> torch.dtype:
        """The most exact floating-point numbers that the device has."""
        return torch.float32 if self.device.type == "mps" else torch.float64

    def sum(self, *numbers: float) -> list[float]:
        """Sums over all ranks, in float64 where the device has it."""
        if self.size == 1:
            return list(numbers)
        totals = torch.tensor(numbers, dtype=self.exact, device=self.device)
        dist.all_reduce(totals)
        return totals.tolist()

    def exchange(self, number: Tensor, flag: bool) -> tuple[Tensor, bool]:
        """The sum of a number over all ranks, and whether any of them raises a flag, without waiting for a GPU.

        Args:
            number: 0-D, on this rank's device. There it is added and there it stays.
            flag: Goes from host to host.
        """
        if self.size == 1:
            return number, flag
        if self.hosts is None:  # one message holds both
            both = torch.stack((number, number.new_tensor(float(flag))))
            dist.all_reduce(both)
            return both[0], bool(both[1] > 0)
        dist.all_reduce(number)
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags, group=self.hosts)
        return number, bool(flags > 0)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def everywhere(self, act: Callable[[], T]) -> T:
        """What ``act`` returns here, once it has worked on all ranks: for what may fail on some, such as files.

        Raises:
            ValueError, OSError: Of ``act`` on a rank where it failed; on the others ValueError, naming a rank that it
                failed on.
        """
        if self.size == 1:
            return act()
        error: Exception | None = None
        try:
            value = act()
        except (ValueError, OSError) as problem:
            error = problem
        rank_errors.raise_shared(error, self.gather("" if error is None else str(error) or repr(error)))
        return value

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

    Where a process group exists already, its ranks are the world, and it stays.

    Args:
        device: "auto", "cuda", "mps" or "cpu".

    Raises:
        ValueError: This machine, or that of another rank, does not have the device.
    """
    joined = dist.is_available() and dist.is_initialized()
    if not joined and not rank_errors.many():
        yield World(rank=0, size=1, device=pick_device(device))
        return
    place, error = None, None
    try:
        place = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    except ValueError as problem:
        error = problem
    if not joined:
        rank_errors.share_errors("device", error)
    elif error is not None:
        raise error
    assert place is not None
    node_size = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if joined:
        yield _world_of(place, node_size)
        return
    with _process_group(place):
        yield _world_of(place, node_size)


def _world_of(place: torch.device, node_size: int) -> World:
    """The ranks of torch's default process group."""
    size = dist.get_world_size()
    hosts = None if place.type == "cpu" else dist.new_group(backend="gloo", timeout=_TIMEOUT)
    return World(rank=dist.get_rank(), size=size, device=place, node_size=node_size or size, hosts=hosts)


@contextlib.contextmanager
def _process_group(place: torch.device) -> Iterator[None]:
    on_gpu = place.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore("group", rank_errors.store()),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=_TIMEOUT,
        device_id=place if on_gpu else None,
    )
    try:
        yield
    except BaseException:
        # Ranks that wait for this one hear of its end as gloo's connections close. NCCL would wait for them here.
        if not on_gpu:
            dist.destroy_process_group()
        raise
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


def spread(model: GPT, here: World, parallel: str, *, gathered: torch.dtype) -> nn.Module:
    """Put a model under DDP ("ddp") or FSDP2 ("fsdp", "hsdp"); it stays as it is where this process is alone.

    With FSDP2 each block is a unit of its own, whose parameters are gathered in the dtype ``gathered``; gradients are
    reduced in fp32 in any case.

    Raises:
        ValueError: "hsdp" on a single node, or on nodes with different numbers of ranks.
    """
    if here.size == 1:
        return model
    if parallel == "ddp":
        devices = [here.device] if here.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    # Logits are a view. FSDP2 warns against changing one in place, which nothing here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    mesh = _mesh(here, parallel)
    policy = MixedPrecisionPolicy()
    if gathered != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _mesh(here: World, parallel: str) -> DeviceMesh:
    """All ranks in one dimension, or nodes in one and the ranks of a node in the other."""
    if parallel == "fsdp":
        return init_device_mesh(here.device.type, (here.size,))
    if here.size == here.node_size:
        raise ValueError(
            f"hsdp shards within each node, and all {here.size} ranks are on one, as LOCAL_WORLD_SIZE tells: choose "
            "--parallel fsdp"
        )
    if here.size % here.node_size:
        raise ValueError(
            f"hsdp needs as many ranks on each node, and {here.size} ranks are not a multiple of the {here.node_size} "
            "here: start as many everywhere, or choose --parallel fsdp"
        )
    nodes = here.size // here.node_size
    return init_device_mesh(here.device.type, (nodes, here.node_size), mesh_dim_names=("replicate", "shard"))


def synchronized(model: nn.Module, *, last: bool) -> AbstractContextManager[object]:
    """The context of a micro-batch's forward and backward.

    DDP reduces gradients with the last one only. FSDP2 scatters them with each, because whole gradients are what it
    has no memory for; between the nodes of HSDP they are reduced with the last one only.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(last)
    return contextlib.nullcontext()


def clip_gradients(model: nn.Module, longest: float | None) -> Tensor:
    """Scale the gradient, over the shards of all ranks, down to a norm; returns the norm before that, 0-D.

    Nothing waits for the device. None leaves the gradient as it is.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # here already, or the factor would be reduced again
    if longest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, longest, norm)
    return norm
