"""What a forward pass handed over for Gauss-Newton-Bartlett: logits, there or deferred, and which of them count."""

from typing import Any, Protocol

import torch
from torch import Tensor

from sophia.optim.curvature.deferred import Head, NoiseRequest, deferred_head
from sophia.optim.curvature.estimator import without_autocast
from sophia.optim.curvature.likelihood import output_noise


class NoiseSettings(Protocol):
    """What of an estimator's settings concerns a model's outputs."""

    @property
    def likelihood(self) -> Any: ...  # noqa: D102
    @property
    def noise(self) -> Any: ...  # noqa: D102
    @property
    def vocab_size(self) -> int | None: ...  # noqa: D102


class Outputs:
    """One micro-batch's predictions as [rows, positions], those of them that count, and the way back from them.

    Args:
        anchor: what the backward pass starts from: the logits, or the scalar that stands for them.
        head: the last layer, where logits are deferred.
        shape: of the predictions, [rows, ...]; each is a vector of logits for the categorical likelihood.
        mask: bool, of that shape, or None where all count. On the host it costs no waiting for the device.
    """

    def __init__(self, anchor: Tensor, head: Head | None, shape: torch.Size, mask: Tensor | None) -> None:
        self.anchor = anchor
        self.rows = shape[0] if shape else 1
        self._head = head
        self._positions = shape.numel() // max(1, self.rows)
        self._mask = None if mask is None else mask.reshape(self.rows, self._positions)

    def keep_rows(self, kept: Tensor) -> None:
        """Count predictions in these rows only. kept: bool [rows], on the host."""
        if self._mask is None:
            self._mask = torch.ones(self.rows, self._positions, dtype=torch.bool)
        self._mask = self._mask & kept.to(self._mask.device, non_blocking=True).unsqueeze(-1)

    def counted(self) -> int:
        """The number of predictions that count. Waits for the device where the mask is on one."""
        return self.rows * self._positions if self._mask is None else int(self._mask.sum())

    def backward(self, settings: NoiseSettings, keys: Tensor, counted: int, scale: float) -> None:
        """Send noise back through the outputs, into `.grad`.

        Args:
            settings: the estimator's.
            keys: int64 [rows], one stream of noise a row.
            counted: the number of predictions that count.
            scale: a power of two on the noise.
        """
        device, mask = self.anchor.device, self._mask
        keys = keys.to(device, non_blocking=True)
        if counted == self.rows * self._positions:
            mask = None
        elif mask is not None:
            mask = mask.to(device, non_blocking=True)
        gradient = None
        if self._head is not None:
            self._head.request = NoiseRequest(
                mask=mask,
                keys=keys,
                kind=settings.noise,
                vocab_size=min(settings.vocab_size or self._head.classes, self._head.vocab_size),
                scale=scale,
                silent=counted == 0,
            )
        else:
            logits = self.anchor.detach()
            tail = logits.shape[-1:] if settings.likelihood == "categorical" else ()
            with torch.no_grad(), without_autocast(device):
                gradient = output_noise(
                    logits.reshape(self.rows, self._positions, *tail),
                    mask,
                    keys,
                    likelihood=settings.likelihood,
                    kind=settings.noise,
                    vocab_size=settings.vocab_size,
                ).view_as(logits)
                if scale != 1:
                    gradient.mul_(scale)
        # `.backward()`, not `autograd.grad`: the hooks of DDP and FSDP2 must run.
        torch.autograd.backward(self.anchor, gradient)


def read_outputs(output: Any, settings: NoiseSettings) -> Outputs:
    """What a forward returned, checked.

    Raises:
        ValueError: it is nothing that the estimator can start from; the message says what to return instead.
    """
    logits, mask = output if isinstance(output, tuple) and _is_mask_pair(output) else (output, None)
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"forward() returned {type(output).__name__}{_keys(output)}, not logits: return a tensor of logits, "
            "an object that holds them as .logits, or (logits, mask) with a bool mask"
        )
    head = deferred_head(logits) if logits.dim() == 0 else None
    if logits.dim() == 0 and head is None:
        raise ValueError(
            "forward() returned a scalar, but Gauss-Newton-Bartlett needs the model's logits: return "
            "model(inputs), not the loss (SophiaH is the one that takes the loss)"
        )
    if not logits.is_floating_point():
        raise ValueError(f"forward() returned {logits.dtype} values, not logits")
    shape = logits.shape if head is None else torch.Size((*head.shape[:-1], head.classes))
    if not logits.requires_grad:
        raise ValueError(
            f"the logits of shape {tuple(shape)} that forward() returned carry no gradient: compute them "
            "with the trainable model, without torch.no_grad(), inference_mode() or detach()"
        )
    if settings.likelihood == "categorical":
        _check_classes(shape, settings.vocab_size)
        predictions = shape[:-1]
    elif head is None:
        predictions = shape
    else:
        raise ValueError(
            f"deferred_logits are for the categorical likelihood, and the estimator's is {settings.likelihood}: return "
            "the model's outputs themselves"
        )
    return Outputs(logits, head, predictions, _checked_mask(mask, shape, predictions))


def _check_classes(shape: torch.Size, vocab_size: int | None) -> None:
    if shape[-1] < 2:
        raise ValueError(
            f"logits of shape {tuple(shape)} have one class, whose curvature is zero: for a binary label "
            'use GaussNewtonBartlett(likelihood="bernoulli"), for a regression likelihood="gaussian"'
        )
    if vocab_size is not None and vocab_size > shape[-1]:
        raise ValueError(
            f"vocab_size={vocab_size} is more than the {shape[-1]} classes of logits of shape "
            f"{tuple(shape)}: give the number of real entries of the padded vocabulary"
        )


def _is_mask_pair(output: tuple[Any, ...]) -> bool:
    if hasattr(output, "logits"):  # a named tuple
        return False
    if len(output) == 2 and isinstance(output[1], Tensor) and output[1].dtype == torch.bool:
        return True
    described = ", ".join(f"{v.dtype} {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__ for v in output)
    raise ValueError(
        f"forward() returned a tuple of ({described}): only (logits, mask) with a mask of dtype torch.bool is "
        "understood; if the model returns (logits, loss), return its first element"
    )


def _checked_mask(mask: Tensor | None, shape: torch.Size, predictions: torch.Size) -> Tensor | None:
    """The mask with one bool a prediction."""
    if mask is None or mask.shape == predictions:
        return mask
    if mask.shape == shape[:-1]:  # where each output is a prediction, a mask of whole vectors will do
        return mask.unsqueeze(-1).expand(predictions)
    raise ValueError(
        f"the mask has shape {tuple(mask.shape)}, but for logits of shape {tuple(shape)} it must be "
        f"{tuple(predictions)}: one bool a prediction"
    )


def _keys(output: Any) -> str:
    return f" of keys {sorted(map(str, output))}" if isinstance(output, dict) else ""
