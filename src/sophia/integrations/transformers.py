"""Hugging Face's Trainer: one callback attaches the optimizer to the model that is trained.

>>> from sophia import SophiaG
>>> from sophia.integrations.transformers import SophiaCallback
>>> trainer = Trainer(
...     model,
...     TrainingArguments("out", weight_decay=0.2),
...     train_dataset=dataset,
...     optimizer_cls_and_kwargs=(SophiaG, {"lr": 6e-4}),
...     callbacks=[SophiaCallback()],
... )
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from sophia.optim import Sophia
from sophia.optim.curvature import Hutchinson
from sophia.optim.labels import CountedPredictions

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as problem:
    raise ImportError("sophia.integrations.transformers needs transformers: pip install 'sophia-lm[hf]'") from problem

# What the classification heads of transformers call their losses, and the likelihoods that these are.
_LIKELIHOODS = {
    "regression": "gaussian",
    "single_label_classification": "categorical",
    "multi_label_classification": "bernoulli",
}

_FSDP1 = (
    "Sophia works under FSDP2, and this model is wrapped by FSDP1, which hides the parameters' shapes: set "
    'fsdp_config={"version": 2}, or fsdp_version: 2 in the configuration of accelerate'
)


class SophiaCallback(TrainerCallback):
    """Lets a Sophia optimizer of Hugging Face's `Trainer` refresh its curvature: `callbacks=[SophiaCallback()]`.

    For `optimizer_cls_and_kwargs=(SophiaG, {…})` and for `optimizers=(SophiaG(…), …)`. It is `optimizer.attach(model)`
    at the beginning of training and `optimizer.detach()` at its end; the training loop is that of AdamW. Predictions
    count where the model's loss depends on them: their label, for most causal models the next one, is not −100. The
    Trainer's logs get `clip_fraction`, this rank's.

    Args:
        logits: from the model's output to its logits (SophiaG) or mean loss (SophiaH); None takes `logits` or `loss`.
        mask: from the model's inputs, cut to `max_batch` rows, to a bool mask of shape logits.shape[:-1] of the
            predictions that count; None makes it of `labels`.
        max_batch: rows of the last micro-batch, per rank, that an estimate is made from.

    Raises:
        ValueError: from the Trainer's constructor or the beginning of `train()`: the optimizer is none of Sophia's, or
            attached already; DeepSpeed, FSDP1, several GPUs in one process, tensor or context parallelism. From
            the first step: the model's output has no logits, its loss is of another likelihood than the estimator's,
            labels do not say which predictions count, or none counts.
    """

    def __init__(
        self,
        *,
        logits: Callable[[Any], Any] | None = None,
        mask: Callable[..., Tensor] | None = None,
        max_batch: int = 8,
    ) -> None:
        self._logits = logits
        self._mask = mask
        self._max_batch = max_batch
        self._attached: Sophia | None = None
        self._built_by_user = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse at once what cannot be trained."""
        _check_engine(args)
        if kwargs.get("optimizer") is not None:
            self._built_by_user = True
            _sophia(kwargs["optimizer"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach the optimizer to the model."""
        _check_engine(args)  # again: the callback may have been added later
        optimizer, model = _sophia(kwargs["optimizer"]), kwargs["model"]
        _check_model(model)
        _compare_settings(args, optimizer, built_by_user=self._built_by_user)
        if self._attached is optimizer:  # a training that was broken off
            optimizer.detach()
        if optimizer._attachment is not None:
            raise ValueError(
                f"this Trainer's {type(optimizer).__name__} is attached already: leave out either .attach(model) or "
                "SophiaCallback()"
            )
        reading = _Reading(model, optimizer, self._logits, self._mask)
        optimizer.attach(
            model,
            logits=reading.loss if reading.wants_loss else reading.logits,
            mask=self._mask if reading.wants_loss else reading.mask,
            max_batch=self._max_batch,
        )
        self._attached = optimizer

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the clipped fraction, by which γ is tuned, to what is printed and to `state.log_history`."""
        if self._attached is not None and logs is not None and "loss" in logs:
            logs["clip_fraction"] = float(self._attached.stats()["clip_fraction"])
            if state.log_history and "loss" in state.log_history[-1]:
                state.log_history[-1]["clip_fraction"] = logs["clip_fraction"]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach the optimizer."""
        if self._attached is not None:
            self._attached.detach()
            self._attached = None


class _Reading:
    """What the estimator is given of a model's output and inputs: logits, and which of them count; or the loss."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Sophia,
        logits: Callable[[Any], Any] | None,
        mask: Callable[..., Tensor] | None,
    ) -> None:
        self.wants_loss = isinstance(optimizer._estimator, Hutchinson)
        self._likelihood = getattr(optimizer._estimator, "likelihood", "categorical")
        self._name = type(optimizer).__name__
        self._model, self._logits, self._mask = model, logits, mask
        self._counted = CountedPredictions(model)
        self._last: tuple[Any, Tensor] | None = None

    def loss(self, output: Any) -> Any:
        """The scalar mean loss, for Hutchinson."""
        loss = self._logits(output) if self._logits is not None else _item(output, "loss", 0)
        if isinstance(loss, Tensor):
            return loss
        raise ValueError(
            f"{self._name} needs the loss, and the output of {_name(self._model)}, {_described(output)}, has none: "
            "let the model compute it from labels (without label_smoothing_factor and compute_loss_func), or pass "
            "SophiaCallback(logits=...), a function from the model's output to its mean loss"
        )

    def logits(self, output: Any) -> Any:
        """The logits; remembers them for the mask, which is asked for next."""
        logits = self._logits(output) if self._logits is not None else _item(output, "logits")
        if not isinstance(logits, Tensor):
            raise ValueError(
                f"{self._name} needs logits, and the output of {_name(self._model)}, {_described(output)}, has none: "
                "pass SophiaCallback(logits=...), a function from the model's output to its logits"
            )
        problem_type = getattr(getattr(self._model, "config", None), "problem_type", None)
        wanted = _LIKELIHOODS.get(str(problem_type), self._likelihood)
        if wanted != self._likelihood and self._logits is None:
            raise ValueError(
                f"the loss of {_name(self._model)} (problem_type={problem_type!r}) is of the {wanted} likelihood, and "
                f"the estimator's is {self._likelihood}: pass {self._name}(..., "
                f'estimator=sophia.curvature.GaussNewtonBartlett(likelihood="{wanted}"))'
            )
        self._last = output, logits
        return logits

    def mask(self, *args: Any, **inputs: Any) -> Tensor:
        """Bool mask of shape logits.shape[:-1] of the predictions that count."""
        assert self._last is not None
        (output, logits), self._last = self._last, None
        shape = logits.shape[:-1]
        if self._mask is not None:
            given = self._mask(*args, **inputs)
            if getattr(given, "dtype", None) != torch.bool:
                raise ValueError(
                    f"SophiaCallback(mask=...) gave a {getattr(given, 'dtype', type(given).__name__)}: it must be a "
                    f"bool tensor of shape {tuple(shape)}"
                )
            return given
        remedy = "pass SophiaCallback(mask=...), a function of the model's inputs to a bool mask of that shape"
        labels = inputs.get("labels") if inputs.get("shift_labels") is None else inputs["shift_labels"]
        counts = self._counted.mask(labels, logits, output, remedy=remedy)
        if counts is not None:
            return counts
        if not isinstance(labels, Tensor):
            raise ValueError(
                f"{_name(self._model)} was called without labels (with label_smoothing_factor or compute_loss_func "
                f"the Trainer keeps them), so which of its predictions of shape {tuple(shape)} count is not known: "
                f"{remedy}"
            )
        return torch.ones(shape, dtype=torch.bool, device=logits.device)


def _sophia(optimizer: Any) -> Sophia:
    """The optimizer inside Accelerate's wrapper."""
    inner = optimizer
    while not isinstance(inner, Sophia) and isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer
    if isinstance(inner, Sophia):
        return inner
    raise ValueError(
        f"SophiaCallback is for Sophia's optimizers, and this Trainer's is {type(inner).__name__}: pass "
        'Trainer(optimizer_cls_and_kwargs=(sophia.SophiaG, {"lr": ...})), or leave the callback out'
    )


def _check_engine(args: TrainingArguments) -> None:
    """Refuse engines under which a forward inside of `step()` is impossible or gives other curvature."""
    if args.deepspeed or getattr(args, "deepspeed_plugin", None) is not None:
        raise ValueError(
            "Sophia does not work under DeepSpeed, whose engine owns backward pass and step: leave out deepspeed=, and "
            'shard by TrainingArguments(fsdp=True, fsdp_config={"version": 2})'
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"Sophia does not work under nn.DataParallel, which the Trainer takes for {args.n_gpu} GPUs in one "
            f"process: start it by `torchrun --nproc-per-node={args.n_gpu}`, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    if (getattr(args, "fsdp_plugin_args", None) or {}).get("fsdp_version") == 1:
        raise ValueError(_FSDP1)
    parallel = getattr(args, "parallelism_config", None)
    for kind in ("tp", "cp", "sp"):
        if getattr(parallel, f"{kind}_enabled", False):
            raise ValueError(
                f"Sophia does not work with {kind}_size={getattr(parallel, f'{kind}_size')} in parallelism_config: it "
                "takes ranks for data-parallel ones; leave that to DDP or FSDP"
            )


def _check_model(model: nn.Module) -> None:
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(_FSDP1)
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise ValueError(
            "Sophia does not work with a tensor-parallel model: it takes ranks for data-parallel ones; load the model "
            "without tp_plan, and leave that to DDP or FSDP"
        )


def _compare_settings(args: TrainingArguments, optimizer: Sophia, *, built_by_user: bool) -> None:
    """Warn of settings without effect: where optimizer and TrainingArguments have both, only one of them counts."""
    name = type(optimizer).__name__
    given, own = float(args.weight_decay), optimizer.defaults["weight_decay"]
    used = {group["weight_decay"] for group in optimizer.param_groups}
    if built_by_user:
        if given not in {0.0, *used}:
            warnings.warn(
                f"TrainingArguments(weight_decay={given:g}) has no effect on an optimizer that the Trainer is "
                f"handed: this {name} decays by {_listed(used)}",
                stacklevel=2,
            )
        return
    default = inspect.signature(type(optimizer)).parameters["weight_decay"].default
    # A decay of TrainingArguments is meant to replace the optimizer's default; its own default, 0, is not meant at all.
    if own not in used and used <= {given, 0.0} and (given == 0.0 or own != default):
        warnings.warn(
            f"{name}'s weight_decay={own:g} is replaced by TrainingArguments(weight_decay={given:g}): set "
            f"TrainingArguments(weight_decay={own:g}), or, if you mean {given:g}, give the same to {name}: "
            f'optimizer_cls_and_kwargs=({name}, {{"weight_decay": {given:g}, ...}})',
            stacklevel=2,
        )
    wanted, lrs = args.learning_rate, {float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups}
    if wanted != inspect.signature(TrainingArguments).parameters["learning_rate"].default and wanted not in lrs:
        warnings.warn(
            f"TrainingArguments(learning_rate={wanted:g}) has no effect on {name}, whose learning rate is "
            f'{_listed(lrs)}: pass optimizer_cls_and_kwargs=({name}, {{"lr": {wanted:g}, ...}})',
            stacklevel=2,
        )


def _item(output: Any, name: str, position: int | None = None) -> Any:
    """A named part of a model's output; of a plain tuple the one at the position."""
    if isinstance(output, Mapping):
        return output.get(name)
    if isinstance(output, tuple) and position is not None and not hasattr(output, name):
        return output[position] if output else None
    return getattr(output, name, None)


def _described(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"{type(output).__name__} of {', '.join(map(str, output)) or 'nothing'}"
    if isinstance(output, tuple):
        return f"a tuple of {len(output)}"
    return f"a {type(output).__name__}"


def _name(model: nn.Module) -> str:
    return type(getattr(model, "_orig_mod", model)).__name__


def _listed(values: set[float]) -> str:
    return " and ".join(f"{value:g}" for value in sorted(values, reverse=True))
