"""The data-parallel replicas of a model: who they are, what they agree on, what their gradients add up to."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from sophia.optim.dtensor import is_dtensor, local, localise, shards

GradientReduction: TypeAlias = Literal["mean", "sum", "none"]
GRADIENT_REDUCTIONS: tuple[str, ...] = ("mean", "sum", "none")


class Replicas:
    """The ranks of one process group, or a single process where torch.distributed is not in use.

    Args:
        group: the process group over which gradients are reduced; None is the default group.
        reduction: what the engine (DDP, FSDP2) does to gradients in `backward()`: "mean", "sum", or "none" where no
            engine is at work and the gradients are reduced here.
    """

    def __init__(self, group: dist.ProcessGroup | None, reduction: str) -> None:
        self.group = group
        self.reduction = reduction
        # Even a group of one rank has an engine, whose hooks run in `.backward()` only.
        self.has_engine = dist.is_available() and dist.is_initialized() and reduction != "none"
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @property
    def alone(self) -> bool:
        """Whether gradients are those of this process, with no engine that handles them."""
        return self.size == 1 and not self.has_engine

    def gather(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """Every rank's numbers, in the order of ranks; the same count of numbers on each rank."""
        if self.size == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.int64, device=self._wire_device(device))
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own, group=self.group)
        return [theirs.tolist() for theirs in everyone]

    def agree(self, error: Exception | None, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """Gather numbers, or raise on all ranks when one of them has an error, so that none waits for another.

        Raises:
            The error itself on the rank that has it, RuntimeError naming that rank on the others.
        """
        gathered = self.gather([int(error is not None), *numbers], device)
        if error is not None:
            raise error
        failed = [rank for rank, (bad, *_) in enumerate(gathered) if bad]
        if failed:
            raise RuntimeError(f"the curvature refresh failed on rank {failed}: its message says why")
        return [rest for _, *rest in gathered]

    def everywhere(self, verdict: bool, device: torch.device) -> bool:
        """Whether the verdict is true on all ranks."""
        return all(theirs == [1] for theirs in self.gather([int(verdict)], device))

    def sum_gradients(self, grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        """From what `backward()` left in `.grad` to the local part of the sum over all ranks, in at least fp32.

        The tensors returned are the caller's own: they share no memory with an engine's buffers.
        """
        if self.size > 1 and self.reduction == "none":
            return self._reduce(grads, params)
        factor = self.size if self.reduction == "mean" else 1
        totals = [None if g is None else _owned(localise(g, p)) for g, p in zip(grads, params, strict=True)]
        return totals if factor == 1 else [None if t is None else t.mul_(factor) for t in totals]

    def check_reduced(self, grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> None:
        """Raise on all ranks when no engine has reduced the gradients.

        That is what a backward pass past the engine leaves: the bare module in place of the DDP wrapper, `no_sync()`,
        or FSDP2 after `set_requires_gradient_sync(False)`. With noise that differs between ranks, unreduced gradients
        of replicated parameters are never alike; sharded parameters get none at all.
        """
        if self.size == 1 or self.reduction == "none":
            return
        # Parameter by parameter: the sums of all norms may happen to agree. The last entry counts gradients.
        norms = torch.zeros(len(params) + 1, dtype=torch.float64, device=local(params[0]).device)
        for index, (grad, param) in enumerate(zip(grads, params, strict=True)):
            if grad is not None:
                norms[-1] += 1
                if not is_dtensor(param):
                    norms[index] = torch.linalg.vector_norm(grad, dtype=torch.float64)
        extremes = torch.stack((norms, -norms)).to(self._wire_device(norms.device))
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.group)
        highest, lowest = extremes[0].cpu(), -extremes[1].cpu()
        if lowest[-1] == 0:
            raise RuntimeError(
                "the backward pass of the curvature refresh has left no gradient on any parameter of this optimizer: "
                "under FSDP2 call refresh_curvature() where set_requires_gradient_sync is True, for example before the "
                "first micro-batch; else let forward() use parameters of this optimizer"
            )
        if (highest - lowest > 1e-3 * highest).any():  # false for NaN, which the finite check refuses
            raise RuntimeError(
                "the curvature gradients differ between ranks, so no engine has reduced them: call the DDP wrapper "
                "itself in forward (not its .module), outside no_sync(), or use optimizer.attach(model), or pass "
                'gradient_reduction="none" to have them reduced here'
            )

    def sum_shards(self, totals: Tensor) -> Tensor:
        """Sum over all ranks of a small tensor whose entries are already weighted by `shard_weight`."""
        if self.size == 1:
            return totals
        wire = totals.to(self._wire_device(totals.device))
        dist.all_reduce(wire, group=self.group)
        return wire.to(totals.device)

    def shard_weight(self, param: Tensor) -> float:
        """1 / the number of ranks that hold the same part of this parameter."""
        return shards(param) / self.size if self.size > 1 else 1.0

    def _reduce(self, grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
        device = params[0].device
        # A parameter may have been used on some ranks only: the others contribute zero.
        used = self.gather([int(g is not None) for g in grads], device)
        totals: list[Tensor | None] = []
        for index, (grad, param) in enumerate(zip(grads, params, strict=True)):
            if not any(flags[index] for flags in used):
                totals.append(None)
                continue
            local = _owned(localise(grad, param)) if grad is not None else _zeros(param)
            wire = local.to(self._wire_device(device))
            dist.all_reduce(wire, group=self.group)
            totals.append(wire.to(device))
        return totals

    def _wire_device(self, device: torch.device) -> torch.device:
        return wire_device(self.group, device)


def wire_device(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """Where tensors must be for a group's backend: gloo talks through the CPU, NCCL through the GPU."""
    return torch.device("cpu") if dist.get_backend(group) == "gloo" else device


def _owned(grad: Tensor) -> Tensor:
    dtype = torch.promote_types(grad.dtype, torch.float32)
    # A view may belong to an engine's bucket, which the next backward pass overwrites.
    return grad.to(dtype, copy=grad._is_view())


def _zeros(param: Tensor) -> Tensor:
    part = local(param)
    return torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32))
