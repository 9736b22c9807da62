"""Curvature refreshes for loops that nobody wants to touch: the optimizer watches the model's training forwards."""

import contextlib
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sophia.optim.dtensor import is_dtensor
from sophia.optim.gradients import set_aside
from sophia.optim.inputs import Arguments, batch_size, sliced, widened
from sophia.optim.labels import CountedPredictions, unwrapped

_REMEDY = "pass attach(model, mask=...), a function of the model's inputs"


class Attachment:
    """Remembers a slice of the last training forward's inputs, and runs the model on it again.

    Args:
        model: the module that the training loop calls.
        wanted: whether a refresh is due; inputs are remembered only then.
        logits: from the model's output to what the estimator wants; None takes the output as it is.
        mask: from the model's (sliced) arguments to the bool mask of the predictions that count.
        max_batch: rows to remember.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Callable[[], bool],
        *,
        logits: Callable[[Any], Any] | None,
        mask: Callable[..., Tensor] | None,
        max_batch: int,
    ) -> None:
        self.model = model
        self._wanted = wanted
        self._logits = logits
        self._mask = mask
        self._max_batch = max_batch
        self._counted = CountedPredictions(model)
        self._arguments: Arguments | None = None
        self._rows = 0
        self.autocast: list[tuple[str, torch.dtype, bool]] = []
        self._replaying = False
        # In front of the user's own pre-hooks: these may change the inputs, and will do so again when replayed.
        self._handle = model.register_forward_pre_hook(_Tap(self), prepend=True, with_kwargs=True)

    @property
    def engine_reduces(self) -> bool:
        """Whether a backward pass through the model reduces its gradients: a DDP wrapper, or FSDP2's DTensors."""
        return isinstance(_uncompiled(self.model), DistributedDataParallel) or any(
            is_dtensor(p) for p in self.model.parameters()
        )

    @property
    def has_inputs(self) -> bool:
        """Whether a training forward was seen since the last refresh."""
        return self._arguments is not None

    def remember(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before each forward of the model: keep a copy of a slice of the inputs, if a refresh is due."""
        if self._replaying or not self.model.training or not torch.is_grad_enabled() or not self._wanted():
            return
        # The Trainer's divisor of the loss, counted over all of a step's batches: a slice has a mean of its own.
        kwargs = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        self._rows = min(batch_size(args, kwargs), self._max_batch)
        self._arguments = sliced((args, kwargs), slice(0, self._rows))
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted({"cpu", *(p.device.type for p in self.model.parameters())})
        ]

    @contextlib.contextmanager
    def replay(self, parts: int, *, with_mask: bool) -> Iterator[list[Callable[[], Any]]]:
        """Forwards over the remembered slice, cut into parts; buffers (BatchNorm's statistics) are put back at the end.

        Args:
            parts: how many slices to cut the rows into; the same on all ranks.
            with_mask: give (logits, mask), else the loss.
        """
        assert self._arguments is not None
        arguments, self._arguments = self._arguments, None
        edges = [self._rows * part // parts for part in range(parts + 1)]
        self._replaying = True
        try:
            # All parameters of the model: its reentrant checkpoints hide those of other optimizers from the graph.
            with _buffers_restored(self.model), set_aside(self.model.parameters()):
                yield [
                    functools.partial(self._forward, arguments, first, end, with_mask=with_mask)
                    for first, end in itertools.pairwise(edges)
                ]
        finally:
            self._replaying = False

    def detach(self) -> None:
        """Stop watching the model."""
        self._handle.remove()
        self._arguments = None

    def _forward(self, arguments: Arguments, first: int, end: int, *, with_mask: bool) -> Any:
        # A rank with fewer rows than parts still takes part in every forward: with a row that does not count.
        args, kwargs = sliced(arguments, slice(first, max(end, first + 1)))
        if any(enabled and not torch.is_autocast_enabled(kind) for kind, _, enabled in self.autocast):
            args, kwargs = widened((args, kwargs))  # this is to be a full-precision forward of what autocast had halved
        output = self.model(*args, **kwargs)
        result = output if self._logits is None else self._logits(output)
        if not with_mask:
            return _read_loss(result)
        logits, mask = _read_logits(result)
        if end == first:
            mask = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        elif self._mask is not None:
            mask = self._mask(*args, **kwargs)
        elif mask is None:
            mask = self._counted.mask(self._labels(args, kwargs), logits, output, remedy=_REMEDY)
        return logits if mask is None else (logits, mask)

    def _labels(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's argument `labels`, by name or place; `shift_labels` go before: they are moved along already."""
        for name in ("shift_labels", "labels"):
            if kwargs.get(name) is not None:
                return kwargs[name]
        try:
            given = inspect.signature(unwrapped(self.model).forward).bind_partial(*args, **kwargs).arguments
        except TypeError:
            return None
        return given.get("labels")


class _Tap:
    """The forward hook. Copies and pickles of a model carry an inert one: only the original feeds the optimizer."""

    def __init__(self, attachment: Attachment | None) -> None:
        self._remember: Callable[..., None] | None = None
        if attachment is not None:
            owner = weakref.ref(attachment)

            def remember(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                attachment = owner()
                if attachment is not None:
                    attachment.remember(args, kwargs)

            # Not a decorator: importing this module must not load the compiler.
            self._remember = torch.compiler.disable(  # type: ignore[no-untyped-call]
                remember,
                reason="Sophia's attach() reads the optimizer's clock before each forward: with fullgraph=True give "
                "attach() the module that torch.compile returned, whose hooks run outside the graph",
            )

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._remember is not None:
            self._remember(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Tap":
        return _Tap(None)

    def __reduce__(self) -> tuple[type["_Tap"], tuple[None]]:
        return _Tap, (None,)


@contextlib.contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    """At the end buffers are as before: those that a forward changed in place, and those that it replaced."""
    kept = [
        (module._buffers, name, buffer, None if buffer is None else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        for holder, name, buffer, before in kept:
            if buffer is not None and before is not None:
                buffer.data.copy_(before)  # `.data`: a graph that the caller still holds stays valid
            if holder.get(name) is not buffer:
                holder[name] = buffer


def _read_loss(result: Any) -> Tensor:
    loss = getattr(result, "loss", result)
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    raise ValueError(
        f"the attached model gave {_described(loss)}, but Hutchinson needs the scalar mean loss: let the model return "
        "it, or an object with .loss, or pass attach(model, logits=...), a function from the model's output to the loss"
    )


def _read_logits(result: Any) -> tuple[Tensor, Tensor | None]:
    """Logits and, where the model gives one, their mask."""
    logits, mask = getattr(result, "logits", result), None
    if isinstance(logits, tuple) and len(logits) == 2 and getattr(logits[1], "dtype", None) == torch.bool:
        logits, mask = logits
    if isinstance(logits, Tensor):
        return logits, mask
    raise ValueError(
        f"the attached model gave {_described(logits)}, not logits or an object with .logits: pass "
        "attach(model, logits=...), a function from the model's output to its logits"
    )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of ({', '.join(map(_described, value))})"
    return f"a {type(value).__name__}"


def _uncompiled(model: nn.Module) -> nn.Module:
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model
