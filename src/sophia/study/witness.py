"""Which batches a run learned from: kept as they came, not as they should have come."""

from pathlib import Path

import torch
from torch import Tensor

from sophia.train import Trainer


class WitnessedTrainer(Trainer):
    """A trainer that keeps the batches of the first, the middle and the last update as these are given them.

    A run that goes on from a checkpoint makes the updates after it again, and keeps the same.
    """

    def update(self, inputs: Tensor, targets: Tensor) -> float:
        """As the trainer's."""
        step = self.progress.step
        if step in _witnessed(self.steps):
            torch.save([inputs.cpu(), targets.cpu()], _place(self.session.folder.path, step))
        return super().update(inputs, targets)


def batches(folder: Path, steps: int) -> list[Tensor]:
    """Inputs and targets of those updates, in their order.

    Args:
        folder: Of a run that came to its end.
        steps: Its length.

    Raises:
        OSError: They are not there.
    """
    return [part for step in _witnessed(steps) for part in torch.load(_place(folder, step), weights_only=True)]


def _witnessed(steps: int) -> tuple[int, int, int]:
    return 0, steps // 2, steps - 1


def _place(folder: Path, step: int) -> Path:
    return folder / f"batch-{step}.pt"
