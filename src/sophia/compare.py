"""`sophia compare`: a fair race between optimizers, from a study file to results.json and report.html."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from sophia import prepare as prepare_command
from sophia.data.prepare import prepare
from sophia.data.recipe import Recipe
from sophia.data.shards import Dataset
from sophia.data.sources import find_sources
from sophia.distributed import pick_device
from sophia.guards import Signals
from sophia.study import lock, read
from sophia.study.advance import advance
from sophia.study.ledger import Ledger
from sophia.study.plan import Plan, plan
from sophia.study.pool import Pool
from sophia.study.progress import Progress
from sophia.study.runs import RunSpec
from sophia.study.settings import Study
from sophia.study.worker import Job
from sophia.train import signal_name

_SIGNALLED = 128  # plus the signal's number: the exit code by which shells tell it


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Settings of `sophia compare`."""

    study: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="STUDY.toml")] = None
    """The study: optimizers, model, text, budgets, seeds. Without one, the study that ships with sophia runs: text that
    every machine has, a model for two CPU cores."""
    out: Path | None = None
    """Folder for runs and results; a study that was begun there goes on. By default compare-out/NAME."""
    workers: int | None = None
    """Runs at the same time. By default one for each GPU; on the CPU as many as its cores allow."""
    threads: int | None = None
    """CPU threads of each run; by default one."""
    minutes: float | None = None
    """Begin no run after so many minutes, and end with what there is: a study advances in pieces."""
    report: bool = False
    """Begin no run at all: only write results and report of what there is."""
    json: bool = False
    """Print the outcome as one JSON object; everything else goes to stderr."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes is {self.minutes:g}; it must be above 0, or use --report to begin no run")


def compare(settings: Annotated[CompareSettings, tyro.conf.arg(name="")]) -> None:
    """Run a study, or go on with one: finished runs are kept, and never repeated."""
    console = Console(stderr=settings.json)
    study = read.read_study(settings.study)
    out = settings.out or Path("compare-out") / study.name
    out.mkdir(parents=True, exist_ok=True)
    with lock.occupied(out):
        _work(study, settings, out, console)


def _work(study: Study, settings: CompareSettings, out: Path, console: Console) -> None:
    data = _data(study, settings, out, console)
    ledger = Ledger(out, lambda text: console.print(text, highlight=False, soft_wrap=True))
    held = lock.take(out, read.frozen(study), data.fingerprint, begun=bool(ledger.runs))
    signals = Signals()
    state = plan(study, ledger.runs)
    if not settings.report and not state.done:
        state = _advance(study, settings, out, data, ledger, held, signals, console)
    _print(state, ledger, console)
    if signals.received:
        console.print(
            f"{signal_name(signals.received)}: stopped with {len(ledger.runs)} finished runs; go on with the same "
            "command",
            highlight=False,
            soft_wrap=True,
        )
        raise SystemExit(_SIGNALLED + signals.received)


def _advance(
    study: Study,
    settings: CompareSettings,
    out: Path,
    data: Dataset,
    ledger: Ledger,
    held: lock.Lock,
    signals: Signals,
    console: Console,
) -> Plan:
    def before(spec: RunSpec) -> None:
        nonlocal held
        if spec.optimizer != study.race.baseline:
            held = lock.note_test(out, held, settings.study)

    gpus, workers, threads = _machine(study, settings)
    job = Job(study=study, data=data.folder, work=out / "work", threads=threads)
    progress = Progress(console)
    pool = Pool(job, workers=workers, gpus=gpus, note=lambda text: progress.note("", text))
    with signals.caught():
        return advance(study, ledger, pool, progress, signals, minutes=settings.minutes, before=before)


def _machine(study: Study, settings: CompareSettings) -> tuple[list[str], int, int]:
    """GPUs, workers and threads of each."""
    threads = settings.threads or 1
    if pick_device(study.machine.device).type != "cuda":
        return [], settings.workers or max(1, prepare_command.usable_cores() // threads), threads
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    if settings.workers is not None and settings.workers > len(gpus):
        raise ValueError(f"workers is {settings.workers}, but there are {len(gpus)} GPUs, and a run has one of its own")
    return gpus[: settings.workers], settings.workers or len(gpus), threads


def _data(study: Study, settings: CompareSettings, out: Path, console: Console) -> Dataset:
    folder = study.data.folder
    if folder is not None:
        return Dataset.open(folder)
    folder = out / "data"
    if (folder / "manifest.json").exists():
        return Dataset.open(folder)
    with console.status("preparing this machine's own text"):
        recipe = Recipe(tokenizer=study.data.tokenizer)
        sources = find_sources(("builtin",), without=folder)
        return prepare(sources, folder, recipe, workers=prepare_command.usable_cores()).dataset


def _print(state: Plan, ledger: Ledger, console: Console) -> None:
    for cell in state.cells:
        console.print(f"{cell.optimizer} {cell.steps} x {cell.tokens_per_step}: {dict(cell.best or ())}")
    console.print(f"{len(ledger.runs)} runs finished, {state.steps_left} updates left")
