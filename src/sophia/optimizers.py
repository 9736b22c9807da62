"""The optimizers that the trainer offers, behind one face: settings in; step, learning rate, curvature and state."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sophia import SophiaH, SophiaK
from sophia.build_optimizers import build
from sophia.config import OptimizerSettings
from sophia.curvature import deferred_logits
from sophia.foreign import Hook, load_hook, step_foreign
from sophia.loss import CrossEntropy
from sophia.meaning import estimates_curvature
from sophia.optim.lion import Lion
from sophia.optim.sophia import Sophia

# Devices whose memory the host reads without waiting for anything.
_READ_AT_ONCE = frozenset({"cpu"})


@dataclass(frozen=True, kw_only=True)
class CurvatureBatch:
    """This rank's sequences of a curvature estimate."""

    inputs: Tensor
    """Ids, [rows, context]; one row at least, also where none counts."""
    targets: Tensor
    """The tokens that follow, [rows, context]."""
    rows: Sequence[int]
    """The global index of each row."""
    chunks: Sequence[int]
    """The forward pass that each row belongs to; -1 for a row that does not count."""
    passes: int
    """Forward passes, as many on every rank."""
    mean_rows: float
    """Rows that count in a forward pass, on the average over all ranks and passes."""


class Optimizers:
    """One rule for all parameters, which may be two of torch's optimizers (Muon for matrices, AdamW for the rest)."""

    def __init__(self, settings: OptimizerSettings, model: nn.Module, *, seed: int) -> None:
        assert settings.lr is not None  # resolved
        self.settings = settings
        self.parts = build(settings, [(name, p) for name, p in model.named_parameters() if p.requires_grad], seed)
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]
        self._read_skips = settings.is_foreign or any(map(_reads_skips, self.parts))
        # One that comes by an import path gets its curvature from a hook.
        self._sophias = [] if settings.is_foreign else [part for part in self.parts if isinstance(part, Sophia)]
        self.hook: Hook | None = load_hook(settings.hook) if settings.hook else None

    def set_lr(self, factor: float) -> float:
        """Set every learning rate to ``factor`` times its peak; returns the one that `lr_by_name` leaves as it is."""
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        return (self.settings.lr or 0.0) * factor

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self, skip: Tensor | None = None) -> None:
        """Update the parameters from their gradients.

        Args:
            skip: 1.0 leaves out the update as if this call had not been, 0.0 does not; 0-D, fp32, where the parameters
                are. A GPU decides by it without being waited for, except for an optimizer that cannot do that: Muon,
                NAdamW, SOAP, Sophia-K, one of an import path, and AdamW where it is not fused.
        """
        if skip is not None and self._read_skips:
            if self._leaves_out(skip):
                return
            skip = None
        for part in self.parts:
            if self.settings.is_foreign:
                step_foreign(part, self.settings.optimizer)
            elif skip is None:
                part.step()
            else:
                _step_unless(part, skip)

    def _leaves_out(self, skip: Tensor) -> bool:
        return bool(skip.item())

    @property
    def curvature_due(self) -> bool:
        """Whether the next step wants a curvature estimate first."""
        return any(part.curvature_due for part in self._sophias)

    @property
    def refreshes(self) -> int | None:
        """Curvature estimates folded in since the run began, resumes included; None where the optimizer has none."""
        if not estimates_curvature(self.settings.optimizer, vars(self.settings)):
            return None
        return max(part.refreshes for part in self._sophias)

    def refresh(self, model: nn.Module, batch: CurvatureBatch) -> None:
        """Estimate the curvature from this batch; all ranks call it together."""
        (sophia,) = self._sophias
        forwards: list[Callable[[], Any]] = []
        rows: list[int] = []
        for number in range(batch.passes):
            members = [place for place, chunk in enumerate(batch.chunks) if chunk == number]
            # A rank without a row of this chunk goes along with one that does not count.
            kept = members or [0]
            rows += [batch.rows[place] for place in kept]
            inputs = _rows_of(batch.inputs, kept)
            if isinstance(sophia, SophiaH):
                weight = len(members) / batch.mean_rows
                forwards.append(functools.partial(_loss, model, inputs, _rows_of(batch.targets, kept), weight))
            else:
                forwards.append(functools.partial(_predictions, model, inputs, bool(members)))
        sophia.refresh_curvature(forwards, rows=None if isinstance(sophia, SophiaH) else rows)

    def clip_fraction(self) -> float | None:
        """Sophia: share of the coordinates clipped in the last step, over all ranks; None for the others."""
        (first, *_) = self.parts
        return float(first.stats(reduce=True)["clip_fraction"]) if isinstance(first, Sophia) else None


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor, weight: float) -> Tensor:
    """The mean loss times a weight: the plain mean over passes and ranks is then the mean over all rows."""
    summed: Tensor = model(inputs, CrossEntropy(targets))
    return summed * (weight / targets.numel())


def _predictions(model: nn.Module, inputs: Tensor, counts: bool) -> Tensor | tuple[Tensor, Tensor]:
    """The model's logits, deferred; with a mask on the host, which nobody waits for, where none counts."""
    logits: Tensor = model(inputs, deferred_logits)
    return logits if counts else (logits, torch.zeros(inputs.shape, dtype=torch.bool))


def _rows_of(tokens: Tensor, places: Sequence[int]) -> Tensor:
    # An index would be made on the host, and its way to the device waited for.
    return torch.stack([tokens[place] for place in places])


def _reads_skips(part: torch.optim.Optimizer) -> bool:
    """Whether a flag that leaves out an update must be read before: where it is in main memory already, or in vain."""
    on_host = any(p.device.type in _READ_AT_ONCE for group in part.param_groups for p in group["params"])
    fused = isinstance(part, torch.optim.AdamW) and all(group["fused"] for group in part.param_groups)
    return on_host or isinstance(part, SophiaK) or not (fused or isinstance(part, (Lion, Sophia)))


def _step_unless(part: torch.optim.Optimizer, skip: Tensor) -> None:
    """A step that leaves itself out on the device. The attribute is the one that torch's GradScaler sets."""
    part.found_inf = skip  # type: ignore[attr-defined]
    try:
        part.step()
    finally:
        del part.found_inf  # type: ignore[attr-defined]
