"""The optimizers that the trainer offers, behind one face: settings in; step, learning rate, curvature and state."""

import fnmatch
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sophia import SophiaG, SophiaH
from sophia.config import OptimizerSettings
from sophia.curvature import GaussNewtonBartlett, Hutchinson, deferred_logits
from sophia.loss import CrossEntropy
from sophia.optim.lion import Lion
from sophia.optim.sophia import Sophia

NamedParameters = list[tuple[str, nn.Parameter]]

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
        assert None not in (settings.lr, settings.beta1, settings.beta2, settings.weight_decay)  # resolved
        self.settings = settings
        self.parts = _build(settings, [(name, p) for name, p in model.named_parameters() if p.requires_grad], seed)
        self._peaks = [[group["lr"] for group in part.param_groups] for part in self.parts]
        self._read_skips = any(map(_reads_skips, self.parts))

    def set_lr(self, factor: float) -> float:
        """Set every learning rate to ``factor`` times its peak; returns the first one's."""
        for part, peaks in zip(self.parts, self._peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
        return float(self.parts[0].param_groups[0]["lr"])

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def step(self, skip: Tensor | None = None) -> None:
        """Update the parameters from their gradients.

        Args:
            skip: 1.0 leaves out the update as if this call had not been, 0.0 does not; 0-D, fp32, where the parameters
                are. A GPU decides by it without being waited for, except for an optimizer of torch's that cannot do
                that: Muon, and AdamW where it is not fused.
        """
        if skip is not None and self._read_skips:
            if self._leaves_out(skip):
                return
            skip = None
        for part in self.parts:
            if skip is None:
                part.step()
            else:
                _step_unless(part, skip)

    def _leaves_out(self, skip: Tensor) -> bool:
        return bool(skip.item())

    @property
    def curvature_due(self) -> bool:
        """Whether the next step wants a curvature estimate first."""
        return any(part.curvature_due for part in self.parts if isinstance(part, Sophia))

    def refresh(self, model: nn.Module, batch: CurvatureBatch) -> None:
        """Estimate the curvature from this batch; all ranks call it together."""
        (sophia,) = self.parts
        assert isinstance(sophia, Sophia)
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


def _build(settings: OptimizerSettings, named: NamedParameters, seed: int) -> list[torch.optim.Optimizer]:
    lr: Any = settings.lr
    betas: Any = (settings.beta1, settings.beta2)
    groups = parameter_groups(settings, named)
    if settings.optimizer == "adamw":
        return [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=_can_fuse(named))]
    if settings.optimizer == "lion":
        return [Lion(groups, lr=lr, betas=betas)]
    if settings.optimizer == "muon":
        return _muon(settings, groups)
    rest: dict[str, Any] = {"lr": lr, "betas": betas, "gamma": settings.gamma, "seed": seed}
    rest["curvature_interval"] = settings.curvature_interval
    rest["state_dtype"] = torch.bfloat16 if settings.state_dtype == "bf16" else None
    if settings.optimizer == "sophia-h":
        # The form that works under DDP and FSDP2, too: one number of ranks gives the curvature of another.
        return [SophiaH(groups, **rest, estimator=Hutchinson(product="finite_difference"))]
    return [SophiaG(groups, **rest, estimator=GaussNewtonBartlett(noise=settings.curvature_noise))]


def _muon(settings: OptimizerSettings, groups: list[dict[str, Any]]) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices; AdamW on embeddings and vectors, at the same learning rate.

    One learning rate serves both, because Muon's update is scaled to the root mean square of AdamW's ("Muon is Scalable
    for LLM Training", arXiv 2502.16982).
    """
    matrices: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in groups:
        for wanted, chosen in ((True, matrices), (False, others)):
            params = [(n, p) for n, p in group["params"] if (p.ndim == 2 and "blocks." in n) is wanted]
            if params:
                chosen.append({**group, "params": params})
    lr: Any = settings.lr
    betas: Any = (0.9, settings.beta2)  # of AdamW; Muon's momentum is its own
    fused = _can_fuse([named for group in others for named in group["params"]])
    adamw = torch.optim.AdamW(others, lr=lr, betas=betas, fused=fused)
    muon = torch.optim.Muon(matrices, lr=lr, momentum=settings.beta1 or 0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def parameter_groups(settings: OptimizerSettings, named: NamedParameters) -> list[dict[str, Any]]:
    """Named parameters by their weight decay: exceptions by name first, then matrices decay and vectors do not.

    Raises:
        ValueError: An exception is not PATTERN=NUMBER, or matches no parameter.
    """
    exceptions = [_exception(text) for text in settings.decay_by_name]
    matched = [False] * len(exceptions)
    groups: dict[float, NamedParameters] = {}
    for name, parameter in named:
        decay = float(settings.weight_decay or 0.0) if parameter.ndim >= 2 else 0.0
        for index, (pattern, value) in enumerate(exceptions):
            if fnmatch.fnmatchcase(name.removeprefix("module."), pattern):
                decay, matched[index] = value, True
                break
        groups.setdefault(decay, []).append((name.removeprefix("module."), parameter))
    for (pattern, _), hit in zip(exceptions, matched, strict=True):
        if not hit:
            names = ", ".join(name for name, _ in named[:4])
            raise ValueError(
                f"decay_by_name: {pattern} matches no parameter that an earlier pattern left; names begin with {names}"
            )
    return [{"params": params, "weight_decay": decay} for decay, params in groups.items()]


def _exception(text: str) -> tuple[str, float]:
    pattern, equals, value = text.rpartition("=")
    try:
        decay = float(value)
    except ValueError:
        decay = -1.0
    if not equals or not pattern or not 0.0 <= decay < float("inf"):
        raise ValueError(f"decay_by_name: {text!r} is not PATTERN=DECAY with a decay of at least 0, as 'tokens.*=0'")
    return pattern, decay


def _reads_skips(part: torch.optim.Optimizer) -> bool:
    """Whether a flag that leaves out an update must be read before: where it is in main memory already, or in vain."""
    on_host = any(p.device.type in _READ_AT_ONCE for group in part.param_groups for p in group["params"])
    fused = isinstance(part, torch.optim.AdamW) and all(group["fused"] for group in part.param_groups)
    return on_host or not (fused or isinstance(part, (Lion, Sophia)))


def _step_unless(part: torch.optim.Optimizer, skip: Tensor) -> None:
    """A step that leaves itself out on the device. The attribute is the one that torch's GradScaler sets."""
    part.found_inf = skip  # type: ignore[attr-defined]
    try:
        part.step()
    finally:
        del part.found_inf  # type: ignore[attr-defined]


def _can_fuse(named: NamedParameters) -> bool:
    return all(p.device.type in ("cpu", "cuda") for _, p in named)
