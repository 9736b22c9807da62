"""The training loop, and what happens around one of its steps.

A step is an update. `step` counts updates done; the batch that update number `step` learns from is number
`step + skipped`, where `skipped` counts the batches left out by rollbacks. Nothing else decides the data.

Between two looks the host waits for no GPU: losses and gradient norms stay there, and an update that is not finite
leaves itself out. At a look (where something is logged, evaluated or regularly saved, and at the end) all of them are
read at once, and the guards go through them step by step. What the guards do is therefore a function of the settings,
not of where a run was stopped: a checkpoint in between takes along what was not looked at.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sophia import checkpoint, snapshot
from sophia.checkpoint import Checkpoint, CheckpointWriter
from sophia.data.loader import Prefetcher
from sophia.display import Display
from sophia.evaluate import Evaluation, evaluate
from sophia.guards import Readings, Signals, SpikeWatch
from sophia.metrics import Metrics
from sophia.micro_batch import run_within_memory
from sophia.optim.dtensor import local
from sophia.resolve import factor
from sophia.session import Session, conditions, restore

# A spike that comes back after so many rollbacks to one checkpoint is not the fault of single batches.
_MOST_ROLLBACKS = 5
LEFT_OUT = "not finite, update left out"
"""How a note on such an update ends."""
_USUALLY_HELPS = "A new run with a lower --lr or a longer --warmup-steps usually helps"


class Diverged(ValueError):
    """Training left the numbers and could not go on."""


@dataclass(kw_only=True)
class Progress:
    """How far a run is, apart from model and optimizers: all of it is in its checkpoints."""

    step: int = 0
    """Updates done, those left out as non-finite included."""
    skipped: int = 0
    """Batches that rollbacks left out."""
    not_finite: int = 0
    """Updates left out because loss or gradient was not finite."""
    not_finite_in_row: int = 0
    """Such updates since the last good one."""
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    """Returns to this checkpoint, as the metrics tell them: its resume writes them again."""
    elapsed: float = 0.0
    """Seconds of training, over all resumes."""
    recent: list[float] = field(default_factory=list)
    """Losses of the recent past, by which a spike is told."""
    unseen: list[tuple[float, float]] = field(default_factory=list)
    """Loss and gradient norm of the last steps, which no guard has looked at yet."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How training ended."""

    step: int
    """Updates done."""
    evaluation: Evaluation | None
    """The last one."""
    signal: int
    """The signal that ended it before the last step, or 0."""


class Trainer:
    """A run in motion."""

    def __init__(
        self, session: Session, display: Display, metrics: Metrics, signals: Signals, note: Callable[[str], None]
    ) -> None:
        self.session, self.display, self.metrics, self.signals, self.note = session, display, metrics, signals, note
        self.settings, self.here = session.settings, session.here
        assert self.settings.schedule.steps is not None
        self.steps: int = self.settings.schedule.steps
        self.interval = self.settings.checkpoints.checkpoint_interval or 1
        state = {} if session.resumed is None else session.resumed.state["progress"]
        self.progress = Progress(**state)
        self.watch = SpikeWatch(self.settings.guards.spike_sigmas, self.progress.recent)
        self.readings = Readings(self.progress.unseen)
        self.writer = CheckpointWriter(
            session.folder.checkpoints,
            keep_last=self.settings.checkpoints.keep_last,
            keep_every=self.settings.checkpoints.keep_every,
            interval=self.interval,
        )
        self.evaluation: Evaluation | None = None
        self._started = time.perf_counter() - self.progress.elapsed
        self._last_log = (self.progress.step, self.elapsed)
        self._stop = False
        self._clip_fraction: float | None = None  # where it had to be asked for before it is told
        self._tell_rollbacks()

    @property
    def elapsed(self) -> float:
        """Seconds of training, over all resumes."""
        return time.perf_counter() - self._started

    def run(self) -> Outcome:
        """Train to the last step, or until a signal."""
        at_checkpoint = self.session.resumed is not None
        batches = self.prefetch()
        try:
            while True:
                done = self.progress.step >= self.steps
                if not at_checkpoint:  # before it was written, this step was evaluated
                    self._evaluate_when_due(done)
                    self._checkpoint_when_due(done)
                at_checkpoint = False
                if done or self._stop:
                    break
                lr = self.update(*next(batches))
                if self._look_due() and (back := self._look(lr)) is not None:
                    batches.close()
                    self._roll_back(*back)
                    batches, at_checkpoint = self.prefetch(), True
        except Exception:
            with contextlib.suppress(OSError):
                self.writer.wait()  # the checkpoint on its way is worth more than a quick end
            raise
        finally:
            batches.close()
        self.writer.wait()
        early = self.progress.step < self.steps
        return Outcome(
            step=self.progress.step,
            evaluation=self.evaluation,
            signal=(self.signals.received or signal.SIGTERM) if early else 0,  # perhaps only another rank's
        )

    def update(self, inputs: Tensor, targets: Tensor) -> float:
        """Curvature when due, gradients, an update: all of it left to the device. Returns the learning rate.

        Also learns whether any rank was to stop.
        """
        stepper, progress = self.session.stepper, self.progress

        # Once for each update, whatever memory does: a hook need not be a function of the step alone.
        index = progress.step + progress.skipped
        stepper.call_hook(inputs, targets, step=progress.step, index=index)

        def compute() -> Tensor:
            stepper.refresh(inputs, targets)
            return stepper.gradients(inputs, targets, index=index)

        own = run_within_memory(compute, self.session, self.note)
        loss, self._stop = self.here.exchange(own, bool(self.signals.received))
        not_finite = self.readings.add(loss, stepper.clip())
        lr = self.session.optimizers.set_lr(factor(self.settings, progress.step))
        self.session.optimizers.step(skip=not_finite)
        progress.step += 1
        self._clip_fraction = None
        if self.settings.optimizer.refresh_when == "after" and progress.step < self.steps:  # nobody needs the last
            if self._log_due():  # of this update, by the curvature and the γ that it was made with
                self._clip_fraction = self.session.optimizers.clip_fraction()
            run_within_memory(lambda: stepper.refresh_after(inputs, targets), self.session, self.note)
        self.display.step(progress.step)
        return lr

    def _log_due(self) -> bool:
        step = self.progress.step
        return step % self.settings.logging.log_interval == 0 or step in (1, self.steps)

    def _look_due(self) -> bool:
        """Whether anything is about to be told or kept that bad numbers would make worthless."""
        step = self.progress.step
        return self._log_due() or step % (self.settings.evaluation.eval_interval or 1) == 0 or step % self.interval == 0

    def _look(self, lr: float) -> tuple[int, int] | None:
        """Let the guards go through the steps since the last look, and log the last one.

        Returns:
            The step of a spike and that of the checkpoint to return to; None where training goes on.
        """
        readings = self.readings.take()
        loss, norm = readings[-1]
        for step, (loss, norm) in enumerate(readings, start=self.progress.step - len(readings) + 1):
            if self._spiked(step, loss) and (place := self._last_regular()) is not None:
                return step, place
            if math.isfinite(loss) and math.isfinite(norm):
                self.progress.not_finite_in_row = 0
            else:
                self._skipped(step, loss, norm)
        if self._log_due():
            self._log(loss, norm, lr)
        return None

    def _skipped(self, step: int, loss: float, norm: float) -> None:
        progress = self.progress
        progress.not_finite += 1
        progress.not_finite_in_row += 1
        self.metrics.write({"step": step, "event": "skipped", "loss": loss, "grad_norm": norm})
        self.note(f"step {step}: loss {loss:g}, gradient norm {norm:g}: {LEFT_OUT}")
        if progress.not_finite_in_row >= self.settings.guards.max_skipped_steps:
            raise Diverged(
                f"{progress.not_finite_in_row} updates in a row had a non-finite loss or gradient, up to step {step}; "
                f"{self._last_checkpoint()}. {_USUALLY_HELPS}"
            )

    def _spiked(self, step: int, loss: float) -> bool:
        """Note a spike; whether to roll back for it."""
        if not self.watch.is_spike(loss):
            return False
        self.metrics.write({"step": step, "event": "spike", "loss": loss})
        self.note(f"step {step}: the loss {loss:.3f} stands out of the recent ones: a spike")
        return self.settings.guards.on_spike == "rollback"

    def _last_regular(self) -> int | None:
        """Where to return to: a step that has a checkpoint in every course of this run, stopped in between or not."""
        step: int | None = self.here.share(self.writer.last_regular() if self.here.main else None)
        if step is None:
            self.note("no checkpoint to return to yet: going on")
        return step

    def _roll_back(self, spike: int, step: int) -> None:
        """Return from a spike to the checkpoint of a step, and leave out the batches that were used after it."""
        place = checkpoint.path_of(self.session.folder.checkpoints, step)
        loaded = self.here.everywhere(lambda: checkpoint.read(place))  # by all, before it is replaced
        next_batch = self.progress.step + self.progress.skipped
        came_from, elapsed = self.progress.step, self.elapsed
        restore(self.session, loaded)
        self.progress = Progress(**loaded.state["progress"])
        self.progress.elapsed = elapsed
        left_out = next_batch - step - self.progress.skipped
        self.progress.skipped += left_out
        self.watch = SpikeWatch(self.settings.guards.spike_sigmas, self.progress.recent)
        self.readings = Readings(self.progress.unseen)
        if len(self.progress.rollbacks) >= _MOST_ROLLBACKS:
            raise Diverged(
                f"the loss spiked again after {_MOST_ROLLBACKS} rollbacks to step {step}; {self._last_checkpoint()}. "
                f"{_USUALLY_HELPS}"
            )
        event = {"step": step + 1, "event": "rollback", "spike_step": spike, "from_step": came_from}
        event["skipped_batches"] = left_out
        self.progress.rollbacks.append(event)
        self.metrics.cut(step, unseen=len(self.progress.unseen))
        self._tell_rollbacks()
        self.note(f"back to the checkpoint of step {step}; {left_out} batches left out")
        if self.here.main:
            self.writer.discard_after(step)
        self._save()  # so that a resume knows what was left out
        self._last_log = (self.progress.step, self.elapsed)

    def _tell_rollbacks(self) -> None:
        """Write down the returns to this checkpoint, whose lines were cut with those of all later steps."""
        for event in self.progress.rollbacks:
            self.metrics.write(event)

    def _evaluate_when_due(self, done: bool) -> None:
        if not done and self.progress.step % (self.settings.evaluation.eval_interval or 1):
            return
        before = self.elapsed
        stepper = self.session.stepper
        self.evaluation = evaluate(
            self.session.model,
            self.session.validation,
            self.session.dataset.validation,
            batch=stepper.micro_batch,
            here=self.here,
            autocast=stepper.autocast,
        )
        record = {
            "step": self.progress.step,
            "tokens": self._tokens(),
            "val_loss": self.evaluation.loss,
            "perplexity": self.evaluation.perplexity,
            "bits_per_byte": self.evaluation.bits_per_byte,
            "elapsed_seconds": self.elapsed,
        }
        self.metrics.write(record)
        self.display.evaluation(record)
        self._pause(self.elapsed - before)

    def _checkpoint_when_due(self, done: bool) -> None:
        before = self.elapsed
        regular = self.progress.step > 0 and self.progress.step % self.interval == 0
        if (done or self._stop or regular) and self._sound(done):
            self.progress.rollbacks = []
            self._save()
            self._pause(self.elapsed - before)
        self.writer.check()

    def _sound(self, done: bool) -> bool:
        """Whether the weights are worth keeping: a loss that is not finite may come of weights that are not."""
        unseen = self.readings.read()
        if all(map(math.isfinite, unseen[-1])) if unseen else not self.progress.not_finite_in_row:
            return True
        bad = sum(int((~local(p.detach()).isfinite()).sum()) for p in self.session.model.parameters())
        (bad_anywhere,) = self.here.sum(float(bad))
        if bad_anywhere and done:
            raise Diverged(f"the last weights are not finite; {self._last_checkpoint()}. {_USUALLY_HELPS}")
        return not bad_anywhere

    def _save(self) -> None:
        unseen = [*self.readings.read()]
        weights, tensors, settings = snapshot.take(self.session.model, self.session.optimizers, self.here)
        if not self.here.main:
            return
        self.progress.elapsed, self.progress.recent = self.elapsed, self.watch.state()
        self.progress.unseen = unseen
        state = {
            "progress": dict(vars(self.progress)),
            "optimizers": settings,
            "model": vars(self.session.config),
            "end_of_text": self.session.dataset.end_of_text,
            "data": self.session.dataset.fingerprint,
            "conditions": conditions(self.session),
        }
        self.writer.save(Checkpoint(step=self.progress.step, model=weights, optimizer=tensors, state=state))

    def _log(self, loss: float, norm: float, lr: float) -> None:
        clipped = self._clip_fraction
        if clipped is None:
            clipped = self.session.optimizers.clip_fraction()
        (step, then), now = self._last_log, self.elapsed
        rate = (self.progress.step - step) * (self.settings.batch.tokens_per_step or 0) / max(now - then, 1e-9)
        self._last_log = (self.progress.step, now)
        record = {
            "step": self.progress.step,
            "tokens": self._tokens(),
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "clip_fraction": clipped,
            "tokens_per_second": rate,
            "elapsed_seconds": now,
        }
        self.metrics.write(record)
        self.display.training(record)

    def _pause(self, seconds: float) -> None:
        """Keep evaluation and checkpoints out of tokens per second."""
        step, then = self._last_log
        self._last_log = (step, then + seconds)

    def _tokens(self) -> int:
        return self.progress.step * (self.settings.batch.tokens_per_step or 0)

    def prefetch(self) -> Prefetcher:
        """The coming batches, read in the background; to be closed."""
        return Prefetcher(
            self.session.batches,
            start=self.progress.step + self.progress.skipped,
            rows=self.session.stepper.rows,
            device=self.here.device,
        )

    def _last_checkpoint(self) -> str:
        with contextlib.suppress(OSError):
            self.writer.wait()
        try:
            place = checkpoint.choose(self.session.folder.checkpoints)
        except ValueError:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {place}"


def signal_name(number: int) -> str:
    """SIGINT, SIGTERM, …"""
    return signal.Signals(number).name
