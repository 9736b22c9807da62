"""One run of a study: the real trainer on the study's model and text, and what it leaves for the judge."""

import contextlib
import datetime
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sophia import config, session
from sophia.config import (
    BatchSettings,
    CheckpointSettings,
    EvaluationSettings,
    LoggingSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
)
from sophia.display import Display
from sophia.distributed import World, world
from sophia.guards import Signals
from sophia.metrics import Metrics, RunMetrics, read_metrics
from sophia.micro_batch import memory_told
from sophia.run import RunFolder
from sophia.session import Session
from sophia.study import witness
from sophia.study.runs import Evidence, FinishedRun, Point, RunSpec
from sophia.study.settings import Study
from sophia.study.witness import WitnessedTrainer
from sophia.train import LEFT_OUT, Diverged, Outcome

# A kill costs at most this part of a run.
_PARTS = 4
_LOG_INTERVAL = 10
_BEGUN = "begun.json"
_FORMAT = 2  # of a run's folder; one of another format begins anew

Note = Callable[[str], None]


class Stopped(Exception):
    """A signal ended the run before its last step; it goes on when it is asked for again."""


def run(
    study: Study,
    spec: RunSpec,
    *,
    data: Path,
    fingerprint: str,
    folder: Path,
    signals: Signals,
    report: Callable[[int], None] = lambda _: None,
    note: Note = lambda _: None,
) -> FinishedRun:
    """Make one run, or finish one that was interrupted. Its folder stays until somebody has noted the result.

    Args:
        study: What is equal for all runs.
        spec: What this one is.
        data: The prepared data.
        fingerprint: That the data must have.
        folder: Of the run; where it exists, the run goes on from its last checkpoint.
        signals: Asked in each step whether to stop, with a checkpoint.
        report: Called with the updates done, after each.
        note: Is told what the trainer tells its user.

    Returns:
        The finished run; a diverged one has no loss.

    Raises:
        Stopped: A signal came.
        ValueError, OSError: The settings cannot work, memory ran out, the disk is full, …
    """
    wanted = train_settings(study, spec, data=data, out=folder)
    with world(wanted.machine.device) as here, contextlib.ExitStack() as held:
        going = _session(wanted, folder, here, note)
        held.enter_context(going.folder.occupied())
        if going.dataset.fingerprint != fingerprint:
            raise ValueError(f"the data in {data} changed while the study ran: put it back, or start a new study")
        peak = going.optimizers.set_lr(1.0)  # the trainer sets the rate again before each update
        weights = json.loads((folder / _BEGUN).read_text(encoding="utf-8"))["weights"]
        finished = True
        try:
            outcome = _train(going, signals, report, _once(note))
        except Diverged as end:
            note(str(end).partition(";")[0])  # where its checkpoint was and what helps is no matter of a search
            finished = False
        else:
            if outcome.signal:
                raise Stopped
        metrics = read_metrics(going.folder.metrics)
        curve = _curve(metrics)
        evidence = _evidence(going, metrics, weights, peak) if finished else None
        if going.compiled:
            torch._dynamo.reset()  # graphs of run after run would reach the compiler's limit
    return FinishedRun(
        spec=spec,
        val_loss=curve[-1].val_loss if finished else None,
        curve=curve,
        seconds=_seconds(metrics, spec),
        evidence=evidence,
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    )


def train_settings(study: Study, spec: RunSpec, *, data: Path, out: Path | None) -> TrainSettings:
    """The trainer's settings for a run: all that the study does not say is the preset's.

    Raises:
        ValueError: The run's optimizer has a setting that the trainer does not know, or a value of another kind.
    """
    race, steps = study.race, spec.steps
    interval = -(-steps // race.evaluations)
    return TrainSettings(
        data=data,
        out=out,
        model=study.model,
        optimizer=optimizer_settings(study, spec),
        schedule=ScheduleSettings(
            steps=steps,
            schedule=race.schedule,
            warmup_steps=round(race.warmup_fraction * steps),
            final_lr_fraction=race.final_lr_fraction,
        ),
        batch=BatchSettings(tokens_per_step=spec.tokens_per_step, seed=spec.seed),
        evaluation=EvaluationSettings(eval_interval=interval, eval_windows=race.eval_windows),
        logging=LoggingSettings(log_interval=min(_LOG_INTERVAL, interval)),
        checkpoints=CheckpointSettings(checkpoint_interval=-(-steps // _PARTS), keep_last=1),
        machine=study.machine,
    )


def optimizer_settings(study: Study, spec: RunSpec) -> OptimizerSettings:
    """The optimizer of a run."""
    optimizer, _, hook = spec.kind.partition("+")
    values: dict[str, Any] = {"max_grad_norm": study.race.max_grad_norm, "optimizer": optimizer}
    values |= {"hook": hook} if hook else {}
    values |= {name: list(value) if isinstance(value, tuple) else value for name, value in spec.settings}
    return config.from_mapping({"optimizer": values}, origin=f"study {study.name}, {spec.optimizer}").optimizer


def _session(wanted: TrainSettings, folder: Path, here: World, note: Note) -> Session:
    """A new session, or that of the run in the folder where it was begun with the same settings."""
    plain = json.loads(json.dumps(config.to_mapping(replace(wanted, data=None, out=None))))  # as it will be read
    begun = _begun(folder)
    if begun is not None and (begun.get("format"), begun.get("wanted")) == (_FORMAT, plain):
        own = replace(RunFolder(folder).settings(), data=wanted.data, out=folder)
        going = session.resume(folder, own, here, note)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        going = session.start(wanted, here, note)
    if going.resumed is None:
        content = {"format": _FORMAT, "wanted": plain, "weights": weights_digest(going.model)}
        partial = folder / f"{_BEGUN}.partial"
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(folder / _BEGUN)
    return going


def _begun(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / _BEGUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


class _Steps(Display):
    """Shows nothing, and reports each update."""

    def __init__(self, total_steps: int, start_step: int, report: Callable[[int], None]) -> None:
        super().__init__(None, total_steps=total_steps, start_step=start_step)
        self._report = report

    def step(self, done: int) -> None:
        self._report(done)


def _once(note: Note) -> Note:
    """Of the updates that a run leaves out only the first is told: a search meets many rates that are too high."""
    told = False

    def first(text: str) -> None:
        nonlocal told
        left_out = text.endswith(LEFT_OUT)
        if not (left_out and told):
            note(text)
        told = told or left_out

    return first


def _train(going: Session, signals: Signals, report: Callable[[int], None], note: Note) -> Outcome:
    steps = going.settings.schedule.steps
    assert steps is not None
    resumed = going.resumed
    first = 0 if resumed is None else resumed.step
    report(first)
    display = _Steps(steps, first, report)
    unseen = 0 if resumed is None else len(resumed.state["progress"].get("unseen", ()))
    with (
        Metrics(going.folder.path, resume_step=None if resumed is None else first, unseen=unseen) as metrics,
        memory_told(going),
    ):
        return WitnessedTrainer(going, display, metrics, signals, note).run()


def _curve(metrics: RunMetrics) -> tuple[Point, ...]:
    points = []
    for line in metrics.evaluations:
        near = min(metrics.training, key=lambda other: abs(other["step"] - line["step"]), default={})
        loss, clipped = (_finite(near.get(name)) for name in ("loss", "clip_fraction"))
        point = Point(
            step=line["step"],
            tokens=line["tokens"],
            val_loss=_finite(line["val_loss"]),
            loss=loss,
            clip_fraction=clipped,
        )
        points.append(point)
    return tuple(points)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _seconds(metrics: RunMetrics, spec: RunSpec) -> float:
    """Time of the updates alone: tokens per second are told without evaluations and checkpoints."""
    seconds, before = 0.0, 0
    for line in metrics.training:
        seconds += (line["step"] - before) * spec.tokens_per_step / max(line["tokens_per_second"], 1e-9)
        before = line["step"]
    return seconds


def _evidence(going: Session, metrics: RunMetrics, weights: str, peak: float) -> Evidence:
    steps = going.settings.schedule.steps
    assert steps is not None
    told = session.conditions(going)
    return Evidence(
        weights=weights,
        batches=_digest(witness.batches(going.folder.path, steps)),
        validation=_digest(going.validation.batch(range(going.validation.count))),
        last_lr_factor=metrics.training[-1]["lr"] / peak,
        refreshes=going.optimizers.refreshes,
        conditions={
            **{name: told[name] for name in ("device", "compile", "threads", "torch", "sophia")},
            "precision": str(going.precision).removeprefix("torch."),
        },
    )


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters, by name."""
    named = [(name.removeprefix("module."), p.detach()) for name, p in model.named_parameters()]
    return _digest((p for _, p in named), "\n".join(name for name, _ in named))


def _digest(tensors: Iterable[Tensor], names: str = "") -> str:
    digest = hashlib.sha256(names.encode())
    for tensor in tensors:
        plain = tensor.cpu().contiguous()
        digest.update(f"{plain.dtype} {list(plain.shape)}".encode())
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
