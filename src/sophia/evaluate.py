"""The loss on text that is never trained on."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from sophia.data.loader import ValidationWindows
from sophia.data.shards import Split
from sophia.distributed import World
from sophia.loss import CrossEntropy


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model's predictions are worth."""

    loss: float
    """Mean cross-entropy of a token in nats."""
    tokens: int
    """Predictions that it is the mean of."""
    tokens_per_byte: float
    """Of the whole split: tokens for each byte of text."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs for a byte of text: comparable between tokenizers, which losses are not."""
        return self.loss * self.tokens_per_byte / math.log(2)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    windows: ValidationWindows,
    split: Split,
    *,
    batch: int,
    here: World,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Evaluation:
    """Mean loss over fixed windows, each on one rank; all ranks call it.

    Args:
        model: A :class:`sophia.model.GPT`; also as a DDP or FSDP2 module.
        windows: What to predict.
        split: Where the windows are from.
        batch: Windows in one forward pass.
        here: The ranks that share the work.
        autocast: Makes the context of a forward pass.
    """
    was_training = model.training
    model.eval()
    share = -(-windows.count // here.size)
    own = range(min(here.rank * share, windows.count), min((here.rank + 1) * share, windows.count))
    total, count = 0.0, 0
    try:
        # The same number of passes on each rank: under FSDP2 every one is a collective call.
        for start in range(0, share, batch):
            chosen = own[start : start + batch]
            inputs, targets = (part.to(here.device) for part in windows.batch(chosen or range(1)))
            with autocast():
                summed = model(inputs, CrossEntropy(targets))
            if chosen:
                total += summed.item()
                count += targets.numel()
    finally:
        model.train(was_training)
    total, tokens = here.sum(total, float(count))
    return Evaluation(loss=total / tokens, tokens=int(tokens), tokens_per_byte=split.tokens / max(split.text_bytes, 1))
