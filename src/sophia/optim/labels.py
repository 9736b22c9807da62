"""Which predictions of a model count: read from the model's own loss.

Models disagree about how labels belong to predictions. Most causal models compare position t with label t + 1, those of
BART's family and most others with label t, some put predictions in front that have no label; and the name of a class
does not tell. But a model that is given labels returns its loss, and the loss depends on the logits that count alone.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sophia.optim import fsdp
from sophia.optim.dtensor import is_dtensor

IGNORED_LABEL = -100  # torch's default ignore_index of cross_entropy
_NEAR, _CLEARLY, _EXACT = 1e-2, 8.0, 1e-5  # of the loss; a ratio; of the loss


class CountedPredictions:
    """Masks of the predictions that count, for one model.

    How its labels belong to its predictions is found out once, from the first refresh that tells: where the loss's
    gradient with respect to the logits is not zero; where a wrapper hides that (a compiler, FSDP2, Accelerate's cast of
    the outputs to fp32), by comparing the loss with the cross-entropy of both ways; where these are as near, from the
    class. Labels that fit neither way are left to the gradient, at every refresh.

    Args:
        model: the one that is run, wrappers included.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._way: str | None = None

    def mask(self, labels: Any, logits: Tensor, output: Any, *, remedy: str) -> Tensor | None:
        """Which predictions count.

        Args:
            labels: what the model was given under that name, if anything.
            logits: [..., classes].
            output: of the model: a mapping or an object with a loss, or a tuple that has it.
            remedy: what to do about labels that do not tell.

        Returns:
            A bool mask of shape logits.shape[:-1]; None where nothing tells, and so all count.

        Raises:
            ValueError: labels are class indices that fit the predictions in no way, and the loss does not help.
        """
        ways = _ways(labels, logits.shape[:-1])
        if self._way in ways:
            return ways[self._way] != IGNORED_LABEL
        loss = loss_of(output)
        gradient = None if loss is None or self._is_sharded() else _gradient(loss, logits)
        has_classes = isinstance(labels, Tensor) and not labels.is_floating_point()
        if gradient is not None and (ways or not has_classes or _is_of_a_softmax(gradient)):
            counts = gradient.ne(0).any(-1)
            fitting = [way for way, targets in ways.items() if torch.equal(targets != IGNORED_LABEL, counts)]
            self._way = fitting[0] if len(fitting) == 1 else None
            return counts
        if ways:
            way = _nearest(ways, logits, loss)
            self._way = way or ("next" if shifts_labels(self._model) and "next" in ways else "same")
            return ways[self._way] != IGNORED_LABEL
        if has_classes:
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not say which of the predictions of shape "
                f"{tuple(logits.shape[:-1])} count: {remedy}"
            )
        return None

    def _is_sharded(self) -> bool:
        """Whether FSDP2 would take a backward pass through the loss alone for a training step's.

        Between forward and backward the root's parameters are whole, so the modules are asked, too.
        """
        return fsdp.shards(self._model) or any(is_dtensor(p) for p in self._model.parameters())


def loss_of(output: Any) -> Tensor | None:
    """The scalar loss in a model's output, if there is one."""
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, tuple) and not hasattr(output, "loss"):
        found = next((part for part in output if isinstance(part, Tensor) and part.dim() == 0), None)
    else:
        found = getattr(output, "loss", None)
    return found if isinstance(found, Tensor) and found.dim() == 0 else None


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's class promises to compare position t with label t + 1, as transformers' causal ones do."""
    model = unwrapped(model)
    kind = getattr(model, "loss_type", None)  # of transformers: the name of its loss
    if kind == "ForConditionalGeneration":  # of image-text models too, which shift, and not as encoder-decoders
        return not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return any(base.__name__.endswith(("ForCausalLM", "LMHeadModel")) for base in type(model).__mro__)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that the user wrote, inside the wrappers of torch.compile, DDP and peft."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, DistributedDataParallel):
            inner = model.module
        if inner is None and callable(getattr(model, "get_base_model", None)):
            inner = model.get_base_model()  # type: ignore[operator]
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def _ways(labels: Any, shape: torch.Size) -> dict[str, Tensor]:
    """For both ways in which labels can belong to predictions of this shape, the label of each prediction."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.numel() != shape.numel():
        return {}
    ways = {"same": labels.reshape(shape)}
    if labels.dim() > 1:
        ways["next"] = F.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL).reshape(shape)
    return ways


def _gradient(loss: Tensor, logits: Tensor) -> Tensor | None:
    """∂loss/∂logits times the number of predictions, where the one is made from the other."""
    if not (loss.requires_grad and logits.requires_grad) or logits.dim() == 0:
        return None
    # The factor keeps a prediction's share of the mean from being rounded to zero in fp16.
    factor = torch.full_like(loss, min(logits.shape[:-1].numel(), 2**15))
    (gradient,) = torch.autograd.grad(loss, logits, factor, allow_unused=True)
    return gradient


def _is_of_a_softmax(gradient: Tensor) -> bool:
    """Whether the last dimension is the classes of a cross-entropy: softmax minus one-hot sums to zero."""
    gradient = gradient.float()
    return bool(gradient.sum(-1).abs().sum() <= _NEAR * gradient.abs().sum())


@torch.no_grad()
def _nearest(ways: Mapping[str, Tensor], logits: Tensor, loss: Tensor | None) -> str | None:
    """The way whose cross-entropy is the loss, if that is clear."""
    if loss is None or len(ways) < 2:
        return None
    errors = {way: abs(_cross_entropy(logits, targets) - float(loss)) for way, targets in ways.items()}
    best, second = sorted(errors, key=lambda way: errors[way])
    scale = abs(float(loss))
    # An error of nan compares as false.
    near = errors[best] <= _NEAR * scale
    return best if near and errors[second] > _CLEARLY * max(errors[best], _EXACT * scale) else None


def _cross_entropy(logits: Tensor, targets: Tensor) -> float:
    """The mean over the targets that are classes; row by row, because logits are large."""
    targets = targets.masked_fill((targets < 0) | (targets >= logits.shape[-1]), IGNORED_LABEL)
    total = sum(
        F.cross_entropy(row.reshape(-1, row.shape[-1]).float(), labels.reshape(-1), reduction="sum")
        for row, labels in zip(logits, targets, strict=True)
    )
    return float(total) / max(int((targets != IGNORED_LABEL).sum()), 1)
