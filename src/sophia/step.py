"""One update's gradients: the loss of a global batch, micro-batch by micro-batch, and the curvature before it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sophia.distributed import World, clip_gradients, synchronized
from sophia.foreign import HookContext, call_hook
from sophia.loss import CrossEntropy
from sophia.optim.noise import stream_key
from sophia.optimizers import CurvatureBatch, Optimizers


@dataclass(kw_only=True)
class Stepper:
    """Computes what an update needs from a rank's rows of a global batch."""

    model: nn.Module
    """The model as the engine (DDP, FSDP2) calls it."""
    optimizers: Optimizers
    """What takes the step."""
    here: World
    """The ranks."""
    rows: range
    """The global rows that this rank holds."""
    total_rows: int
    """Rows of the global batch."""
    micro_batch: int
    """Rows in one forward pass."""
    max_grad_norm: float
    """Longest gradient; 0 for any."""
    seed: int
    """Of dropout."""
    autocast: Callable[[], AbstractContextManager[object]]
    """Makes the context of a forward pass."""
    compiled: bool = False
    """Whether the model runs through torch.compile."""

    def call_hook(self, inputs: Tensor, targets: Tensor, *, step: int, index: int) -> None:
        """Before an update: call the settings' hook, if there is one.

        Args:
            inputs: This rank's rows, [rows, context].
            targets: The tokens that follow.
            step: Updates done.
            index: The batch's number in the order of the data; what the hook draws is drawn from it.

        Raises:
            ValueError: The hook raised something, or changed the batch that the update is to learn from.
        """
        hook = self.optimizers.hook
        if hook is None:
            return
        torch.manual_seed(stream_key(self.seed, index, self.total_rows + self.rows[0]) % 2**63)  # no row has this one
        context = HookContext(
            step=step,
            model=self.model,
            optimizer=self.optimizers.parts[0],
            inputs=inputs,
            targets=targets,
            autocast=self.autocast,
        )
        before = inputs._version, targets._version
        call_hook(hook, self.optimizers.settings.hook, context)
        if (inputs._version, targets._version) != before:
            raise ValueError(
                f"hook {self.optimizers.settings.hook} in step {step + 1} changed inputs or targets in place, from "
                "which the update learns: change a clone()"
            )

    def refresh(self, inputs: Tensor, targets: Tensor) -> None:
        """Before an update: renew the curvature from some of the batch's rows, when that is due.

        Drops the last update's gradients.
        """
        if self.optimizers.curvature_due:
            self.optimizers.zero_grad()  # the estimate would be made beside them
            with self.autocast():
                self.optimizers.refresh(self.model, self.curvature_batch(inputs, targets))

    def refresh_after(self, inputs: Tensor, targets: Tensor) -> None:
        """After an update from this batch: :meth:`refresh` for the next one, where that is asked for.

        Then nothing is due before that one any more. Before the very first update it is: none is made blind.
        """
        if self.optimizers.settings.refresh_when == "after":
            self.refresh(inputs, targets)

    def curvature_batch(self, inputs: Tensor, targets: Tensor) -> CurvatureBatch:
        """This rank's rows among those that curvature is estimated from.

        They are spread evenly over the global batch. Sophia-G deals them to the chunks in turn, whatever the number of
        ranks: a chunk's gradient is squared. Sophia-H, whose estimate is a mean, takes them as micro-batches.
        """
        wanted, chunks = self.optimizers.settings.curvature_rows or 1, self.optimizers.settings.curvature_chunks
        chosen = [place * self.total_rows // wanted for place in range(wanted)]
        own = [(row, place) for place, row in enumerate(chosen) if row in self.rows]
        if chunks is None:
            passes = -(-wanted // (self.here.size * self.micro_batch))  # no rank has more rows than any other, but one
            members = [(row, number // self.micro_batch) for number, (row, _) in enumerate(own)]
        else:
            passes = chunks
            members = [(row, place % chunks) for row, place in own]
        members = members or [(self.rows[0], -1)]
        places = [row - self.rows[0] for row, _ in members]
        # Row by row: the way of an index to the device would be waited for.
        return CurvatureBatch(
            inputs=torch.stack([inputs[place] for place in places]),
            targets=torch.stack([targets[place] for place in places]),
            rows=[row for row, _ in members],
            chunks=[number for _, number in members],
            passes=passes,
            mean_rows=wanted / (self.here.size * passes),
        )

    def gradients(self, inputs: Tensor, targets: Tensor, *, index: int) -> Tensor:
        """Leave the gradient of the global batch's mean loss in `.grad`; returns this rank's part of that mean.

        Nothing waits for the device: the loss stays there, 0-D, in float64 where the device has it.

        Args:
            inputs: This rank's rows, [rows, context].
            targets: The tokens that follow.
            index: The batch's number in the order of the data; dropout is drawn from it.
        """
        self.optimizers.zero_grad()
        total = torch.zeros((), device=inputs.device)
        starts = range(0, len(inputs), self.micro_batch)
        fused = self.compiled and inputs.device.type == "cuda"  # on a CPU it is a tenth slower in fp32
        for start in starts:
            part = slice(start, start + self.micro_batch)
            # A function of (seed, batch, row), like all randomness here: there is no generator to save and restore.
            torch.manual_seed(stream_key(self.seed, index, self.rows[start]) % 2**63)
            with synchronized(self.model, last=start == starts[-1]):
                with self.autocast():
                    summed = self.model(inputs[part], CrossEntropy(targets[part], compiled=fused))
                    loss = summed / targets.numel()  # engines average over the ranks, which hold as many rows each
                torch.autograd.backward(loss)
            total += loss.detach()
        return total.to(self.here.exact) / self.here.size

    def clip(self) -> Tensor:
        """Scale the gradient down to the longest allowed; returns its norm before that, 0-D, on the device."""
        return clip_gradients(self.model, self.max_grad_norm or None)
