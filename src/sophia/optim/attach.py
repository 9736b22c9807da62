"""Curvature refreshes for loops that nobody wants to touch: the optimizer watches the model's training forwards."""

import contextlib
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

IGNORED_LABEL = -100  # torch's default ignore_index of cross_entropy

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


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
        self._arguments: Arguments | None = None
        self._autocast: list[tuple[str, torch.dtype, bool]] = []
        self._replaying = False
        self._handle = model.register_forward_pre_hook(_Tap(self), with_kwargs=True)

    @property
    def engine_reduces(self) -> bool:
        """Whether a backward pass through the model reduces its gradients: a DDP wrapper, or FSDP2's DTensors."""
        return isinstance(_uncompiled(self.model), DistributedDataParallel) or any(
            isinstance(p, DTensor) for p in self.model.parameters()
        )

    @property
    def has_inputs(self) -> bool:
        """Whether a training forward was seen since the last refresh."""
        return self._arguments is not None

    def remember(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before each forward of the model: keep a copy of a slice of the inputs, if a refresh is due."""
        if self._replaying or not self.model.training or not torch.is_grad_enabled() or not self._wanted():
            return
        rows = _batch_size(args, kwargs)
        kept = slice(0, min(rows, self._max_batch))
        self._arguments = _sliced((args, kwargs), kept)
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in sorted({"cpu", *(p.device.type for p in self.model.parameters())})
        ]

    @contextlib.contextmanager
    def replay(self, parts: int, *, with_mask: bool) -> Iterator[list[Callable[[], Any]]]:
        """Forwards over the remembered slice, cut into parts; buffers (BatchNorm's statistics) are put back at the end.

        Args:
            parts: how many slices to cut the rows into; the same on all ranks.
            with_mask: give (logits, mask) under the autocast state of the training forward, else what `logits` takes
                from the output, in full precision.
        """
        assert self._arguments is not None
        arguments, self._arguments = self._arguments, None
        rows = _batch_size(*arguments)
        edges = [rows * part // parts for part in range(parts + 1)]
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self._replaying = True
        try:
            yield [
                functools.partial(self._forward, arguments, first, end, with_mask=with_mask)
                for first, end in itertools.pairwise(edges)
            ]
        finally:
            self._replaying = False
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    def detach(self) -> None:
        """Stop watching the model."""
        self._handle.remove()
        self._arguments = None

    def _forward(self, arguments: Arguments, first: int, end: int, *, with_mask: bool) -> Any:
        # A rank with fewer rows than parts still takes part in every forward: with a row that does not count.
        args, kwargs = arguments = _sliced(arguments, slice(first, max(end, first + 1)))
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled and with_mask))
            output = self.model(*args, **kwargs)
        result = output if self._logits is None else self._logits(output)
        if not with_mask:
            return result
        mask = self._mask(*args, **kwargs) if self._mask is not None else self._label_mask(args, kwargs, result)
        if end == first:
            logits = getattr(result, "logits", result)
            mask = torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        return result if mask is None else (result, mask)

    def _label_mask(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Tensor | None:
        """From `labels` among the inputs: a prediction counts where its label is not −100."""
        inner = _inner(self.model)
        try:
            labels = inspect.signature(inner.forward).bind_partial(*args, **kwargs).arguments.get("labels")
        except TypeError:
            labels = None
        labels = kwargs.get("labels", labels)
        logits = getattr(result, "logits", result)
        if not isinstance(labels, Tensor) or labels.is_floating_point() or not isinstance(logits, Tensor):
            return None
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not say which of the predictions of shape "
                f"{tuple(logits.shape[:-1])} count: pass attach(model, mask=...), a function of the model's inputs"
            )
        counts = labels != IGNORED_LABEL
        if _shifts_labels(inner):
            counts = torch.cat((counts[:, 1:], torch.zeros_like(counts[:, :1])), dim=1)
        return counts


class _Tap:
    """The forward hook. Copies and pickles of a model carry an inert one: only the original feeds the optimizer."""

    def __init__(self, attachment: Attachment | None) -> None:
        self._attachment = (lambda: None) if attachment is None else weakref.ref(attachment)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # inside a compiled model the hook stays eager: it reads the optimizer's clock
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attachment = self._attachment()
        if attachment is not None:
            attachment.remember(args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Tap":
        return _Tap(None)

    def __reduce__(self) -> tuple[type["_Tap"], tuple[None]]:
        return _Tap, (None,)


def _uncompiled(model: nn.Module) -> nn.Module:
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _inner(model: nn.Module) -> nn.Module:
    """The module that the user wrote, inside torch.compile's and DDP's wrappers."""
    model = _uncompiled(model)
    if isinstance(model, DistributedDataParallel):
        model = _uncompiled(model.module)
    return model


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the model compares position t with label t + 1: the convention of transformers' causal models."""
    return any(kind.__name__.endswith(("ForCausalLM", "LMHeadModel")) for kind in type(model).__mro__)


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, lists and mappings, with a name for each; anything opaque is refused."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}[{key!r}]" if name else str(key))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}[{index}]" if name else f"input {index}")
    elif not (value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype, torch.device))):
        raise ValueError(
            f"{name} of the model is a {type(value).__name__}, which attach() cannot slice along the batch: "
            "call optimizer.refresh_curvature(forward) yourself in this loop"
        )


def _batch_size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    found = [(name, t) for name, t in (*_tensors(tuple(args), ""), *_tensors(kwargs, "")) if t.dim() > 0]
    if not found:
        raise ValueError(
            "the model was called without a tensor input that has a batch dimension, so attach() has nothing to slice: "
            "call optimizer.refresh_curvature(forward) yourself in this loop"
        )
    rows = found[0][1].shape[0]
    for name, tensor in found:
        if tensor.shape[0] != rows:
            raise ValueError(
                f"{name} of the model has shape {tuple(tensor.shape)} and {found[0][0]} {tuple(found[0][1].shape)}: "
                "attach() slices all inputs along their first dimension, the batch, which must have one size; "
                "call optimizer.refresh_curvature(forward) yourself in this loop"
            )
    return rows


def _sliced(value: Any, part: slice) -> Any:
    """The value with every tensor replaced by a detached copy of its rows `part`."""
    if isinstance(value, Tensor):
        return value.detach()[part].clone() if value.dim() > 0 else value
    if isinstance(value, Mapping):
        return {key: _sliced(item, part) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_sliced(item, part) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_sliced(item, part) for item in value)
    return value
