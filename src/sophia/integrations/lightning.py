"""Sophia in Lightning: one callback beside it, automatic optimization left on.

Lightning runs `training_step` inside `optimizer.step(closure)`. Sophia's step calls the closure first, so that the
batch is known and the gradients are there, accumulated and clipped; then it refreshes at the same weights, and updates.
What is left to find out is which module `training_step` calls: the callback watches for it, and attaches the optimizer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sophia.optim import Sophia
from sophia.optim.labels import shifts_labels

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback  # type: ignore[assignment] # its other name
    except ImportError as missing:
        raise ImportError(
            "sophia.integrations.lightning needs Lightning 2: pip install 'sophia-lm[lightning]'"
        ) from missing

# Strategies that change what a parameter or its gradient is, by the names of their classes.
_REFUSED = {
    "DeepSpeedStrategy": "DeepSpeed keeps gradients and optimizer state to itself",
    "FSDPStrategy": "FSDP1 flattens the parameters",
}


class SophiaCallback(Callback):
    """Refreshes the curvature of a LightningModule's Sophia by itself, as `optimizer.attach(model)` in a plain loop.

    In `training_step` it takes the first module called that holds all of the optimizer's parameters: the
    LightningModule (`self(x)`) or a part of it (`self.net(x)`). What that module returns must be the logits, or have
    them as `.logits`; for `SophiaH` the mean loss. Steps are the optimizer's own, whatever `accumulate_grad_batches`
    is; validation is ignored.

    Args:
        model: name of the module whose output is the logits, for example "net" or "model.decoder"; None finds it.
        optimizer: which of the module's optimizers, by its index; None where there is one.
        logits: from the module's output to its logits (or loss); see `Sophia.attach`.
        mask: from the module's inputs to the bool mask of the predictions that count; see `Sophia.attach`.
        max_batch: rows of the batch, per rank, that the estimate is made from.

    Raises:
        ValueError: when fit begins, for a strategy that is not supported (DeepSpeed, FSDP1, tensor parallelism), for
            several optimizers of which none is named, and for one that is no Sophia.
        RuntimeError: at the first step, when `training_step` called no such module.

    Example:
        >>> trainer = L.Trainer(max_epochs=1, callbacks=[SophiaCallback()])
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        optimizer: int | None = None,
        logits: Callable[[Any], Any] | None = None,
        mask: Callable[..., Tensor] | None = None,
        max_batch: int = 8,
    ) -> None:
        self._name = model
        self._index = optimizer
        self._settings: dict[str, Any] = {"logits": logits, "mask": mask, "max_batch": max_batch}
        self._optimizer: Sophia | None = None
        self._models: dict[str, nn.Module] = {}
        self._handles: list[RemovableHandle] = []
        self._passed_through: nn.Module | None = None
        self._found = False

    # ---- what Lightning calls

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what cannot work before anything is moved or wrapped."""
        if stage != "fit":
            return
        names = {kind.__name__ for kind in type(trainer.strategy).__mro__}
        for name, reason in _REFUSED.items():
            if name in names:
                raise ValueError(
                    f"Sophia does not support {name}: {reason}. Use strategy='ddp', or ModelParallelStrategy (FSDP2)"
                )
        if "ModelParallelStrategy" in names and trainer.strategy.device_mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "Sophia does not support tensor parallelism: it takes all processes for data-parallel ones. Use "
                "ModelParallelStrategy(data_parallel_size=…, tensor_parallel_size=1)"
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the optimizer, and the modules that may turn out to be the model."""
        optimizer = _chosen(trainer.optimizers, self._index)
        self._models = _candidates(pl_module, optimizer, self._name)
        optimizer.attach(next(iter(self._models.values())), **self._settings)  # says now what it would say later
        optimizer.detach()
        self._optimizer, self._found = optimizer, False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Where a refresh is due, watch for the forward that it is to be made from."""
        if self._optimizer is None or not self._optimizer.curvature_due:
            return
        # Strategies that wrap the module (DDP) have its __call__ stand in for training_step, with a batch as argument.
        # It must not be taken for a forward: so there is no attachment yet while that call begins.
        self._optimizer.detach()
        self._passed_through = pl_module if trainer.strategy.model is not pl_module else None
        watch = torch.compiler.disable(self._watch)  # type: ignore[no-untyped-call]
        self._unwatch()
        # In front of the user's own pre-hooks: these may change the inputs, and will do so again in the refresh.
        self._handles = [
            model.register_forward_pre_hook(watch, prepend=True, with_kwargs=True) for model in self._models.values()
        ]

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """After the closure: by now the model was called, or never will be."""
        if optimizer is self._optimizer and self._handles and not self._found:
            raise RuntimeError(
                f"training_step called none of {', '.join(self._models)}, so that SophiaCallback does not know which "
                "module's output is the logits: call one of them in training_step, or name the module, "
                'SophiaCallback(model="…")'
            )

    def on_train_batch_end(self, *_: Any) -> None:
        """Watch no longer: what is called between two training steps is not for training."""
        self._unwatch()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave no hook behind."""
        self._release()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._release()

    # ---- private

    def _watch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is self._passed_through:
            self._passed_through = None
            return
        if not module.training or not torch.is_grad_enabled() or self._optimizer is None:
            return
        self._unwatch()
        self._found = True
        self._optimizer.attach(module, **self._settings)
        # This call began before there was an attachment, which will see by itself only those that follow.
        attachment = self._optimizer._attachment
        assert attachment is not None
        attachment.remember(args, kwargs)

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _release(self) -> None:
        self._unwatch()
        if self._optimizer is not None:
            self._optimizer.detach()
        self._optimizer, self._models, self._passed_through = None, {}, None


def _chosen(optimizers: list[Any], index: int | None) -> Sophia:
    """The optimizer of this index, or the only one."""
    kinds = ", ".join(f"{number}: {type(optimizer).__name__}" for number, optimizer in enumerate(optimizers))
    if index is None and len(optimizers) != 1:
        raise ValueError(
            f"the LightningModule has {len(optimizers)} optimizers ({kinds}): say which one is to be refreshed, for "
            "example SophiaCallback(optimizer=0), with a callback for each Sophia"
        )
    if index is not None and index not in range(len(optimizers)):
        raise ValueError(f"SophiaCallback(optimizer={index!r}) is none of the LightningModule's optimizers ({kinds})")
    optimizer = optimizers[index or 0]
    if not isinstance(optimizer, Sophia):
        raise ValueError(
            f"SophiaCallback has nothing to refresh: the optimizer is {type(optimizer).__name__}. Return SophiaG, "
            "SophiaH or SophiaK from configure_optimizers, or leave the callback out"
        )
    if optimizer._attachment is not None:
        raise ValueError(
            "the optimizer is attached to a model already: leave .attach(…) out of configure_optimizers, or leave out "
            "the callback"
        )
    return optimizer


def _candidates(pl_module: nn.Module, optimizer: Sophia, name: str | None) -> dict[str, nn.Module]:
    """The modules whose call in training_step may be the forward, by the names that the user has for them."""
    if name is not None:
        modules = dict(pl_module.named_modules())
        if name not in modules:
            parts = ", ".join(repr(part) for part, module in pl_module.named_children() if list(module.parameters()))
            raise ValueError(f"SophiaCallback(model={name!r}): the LightningModule has no such part, but has {parts}")
        return {f"self.{name}" if name else "self": modules[name]}
    trained = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    found = {
        f"self.{path}" if path else "self": module
        for path, module in pl_module.named_modules()
        if trained <= set(module.parameters()) and "_orig_mod" not in path.split(".")  # what torch.compile wraps
    }
    if not found:
        raise ValueError(
            "the optimizer trains parameters that the LightningModule does not hold: name the module whose output is "
            'the logits, SophiaCallback(model="…")'
        )
    # How labels belong to predictions is read from the loss of the module attached, or from its class. A causal model
    # has both, and the LightningModule around it may have neither.
    shifting = {path: module for path, module in found.items() if shifts_labels(module)}
    return dict([next(iter(shifting.items()))]) if shifting else found
