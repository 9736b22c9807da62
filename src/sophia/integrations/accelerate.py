"""Sophia in a loop of Accelerate: one line after `accelerator.prepare`.

`prepare` hides the optimizer in a wrapper that knows `step` and `zero_grad` only, and may wrap the model (DDP). The
line looks through the first and takes the second as it is; the loop below it stays as it was for AdamW.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from sophia.optim import Sophia

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.utils import DistributedType
except ImportError as missing:
    raise ImportError("sophia.integrations.accelerate needs Accelerate: pip install 'sophia-lm[hf]'") from missing


def attach(
    optimizer: AcceleratedOptimizer,
    model: nn.Module,
    *,
    logits: Callable[[Any], Any] | None = None,
    mask: Callable[..., Tensor] | None = None,
    max_batch: int = 8,
) -> AcceleratedOptimizer:
    """Let a prepared optimizer refresh its curvature by itself, from the forwards of the prepared model.

    Within `accelerator.accumulate` a refresh is made from the last micro-batch, at the step that updates. Methods that
    the wrapper hides are those of `optimizer.optimizer`: `optimizer.optimizer.stats()`.

    Args:
        optimizer: what `accelerator.prepare` gave for the `SophiaG`, `SophiaH` or `SophiaK`.
        model: what `accelerator.prepare` gave for the model: the module that the loop calls.
        logits: from the model's output to its logits (or loss); see `Sophia.attach`.
        mask: from the model's inputs to the bool mask of the predictions that count; see `Sophia.attach`.
        max_batch: rows of the batch, per process, that the estimate is made from.

    Returns:
        The optimizer that was given.

    Raises:
        ValueError: the optimizer is not prepared or no Sophia, or DeepSpeed, Megatron-LM, FSDP1, tensor or context
            parallelism is at work.
        RuntimeError: the optimizer is attached already.

    Example:
        >>> model, optimizer, loader = accelerator.prepare(model, SophiaG(model.parameters()), loader)
        >>> attach(optimizer, model)
    """
    if isinstance(optimizer, nn.Module):
        raise ValueError("the optimizer comes first: attach(optimizer, model)")
    if not isinstance(optimizer, AcceleratedOptimizer):
        raise ValueError(
            f"the optimizer is a bare {type(optimizer).__name__}: call accelerator.prepare(model, optimizer, …) first, "
            "and attach what it returns"
        )
    _check_engine(optimizer.accelerator_state, model)
    inner: Any = optimizer
    while isinstance(inner, AcceleratedOptimizer):
        inner = inner.optimizer
    if not isinstance(inner, Sophia):
        raise ValueError(
            f"the prepared optimizer is {type(inner).__name__}, which has no curvature to refresh: prepare SophiaG, "
            "SophiaH or SophiaK, or leave attach out"
        )
    inner.attach(model, logits, mask, max_batch)
    return optimizer


def _check_engine(state: Any, model: object) -> None:
    """Refuse engines under which a forward inside of `step()` is impossible, or gives other curvature."""
    kind = state.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"Sophia does not support {kind.value}, which keeps gradients and optimizer state to itself: use DDP or "
            "FSDP2 (accelerate config)"
        )
    if isinstance(model, nn.Module) and any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        raise ValueError("Sophia does not support FSDP1, which flattens the parameters: choose fsdp_version: 2")
    for way in ("tp", "cp", "sp"):
        if getattr(getattr(state, "parallelism_config", None), f"{way}_enabled", False):
            raise ValueError(
                f"Sophia does not support {way}_size in parallelism_config: it takes all processes for data-parallel "
                "ones. Use DDP or FSDP2 alone"
            )
