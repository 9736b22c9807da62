"""`sophia compare`: a fair race between optimizers, from a study file to results.json and report.html."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import torch
import tyro
from rich.console import Console

from sophia.distributed import pick_device
from sophia.guards import Signals
from sophia.occupied import occupied
from sophia.prepare import usable_cores
from sophia.rank_errors import many
from sophia.study import lock, outcome, read, timing
from sophia.study.advance import advance
from sophia.study.imports import imports
from sophia.study.ledger import Ledger
from sophia.study.measured import Cost
from sophia.study.plan import Plan, plan
from sophia.study.pool import Pool
from sophia.study.progress import Progress
from sophia.study.reuse import Loan
from sophia.study.runs import RunSpec
from sophia.study.settings import Study
from sophia.study.text import StudyText, open_text
from sophia.study.worker import Job
from sophia.train import signal_name

_SIGNALLED = 128  # plus the signal's number: the exit code by which shells tell it


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Settings of `sophia compare`."""

    study: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[STUDY.toml]")] = None
    """The study: optimizers, model, text, budgets, seeds. Without one the study that ships with sophia runs: a model
    for two CPU cores, on text that every machine has."""
    out: Path | None = None
    """Folder for runs and results; a study that was begun there goes on. By default compare-out/NAME."""
    workers: int | None = None
    """Runs at the same time. By default one for each GPU; on the CPU as many as its cores allow."""
    threads: int | None = None
    """CPU threads of each run; by default one."""
    minutes: float | None = None
    """Begin no run after so many minutes, and end with what there is: a study advances in pieces."""
    reuse: Path | None = None
    """Take finished runs that this study wants from the --out folder of another one, of the same text, model and rules:
    a baseline that was tuned there need not be tuned again."""
    report: bool = False
    """Begin no run at all: only write results and report of what there is, also while another process goes on."""
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
    """Run a study, or go on with one: finished runs are kept, and never made again.

    docs/studies.md says what a study file holds, docs/protocol.md by which rules it is judged.
    """
    piece = _Piece(settings, Console(stderr=settings.json))
    if settings.report:
        piece.report()
    else:
        piece.run()


class _Piece:
    """One call of the command: a study advances in pieces."""

    def __init__(self, settings: CompareSettings, console: Console) -> None:
        if many():
            raise ValueError("compare starts its own processes, one for each GPU: run it without torchrun")
        self.settings, self.console = settings, console
        self.study: Study = read.read_study(settings.study)
        self.file = outcome.study_file(settings.study)
        self.out = settings.out or Path("compare-out") / self.study.name

    def say(self, line: str) -> None:
        """Tell the user."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def report(self) -> None:
        """Write results and report of what there is; nothing else is changed."""
        ledger = Ledger(self.out, mend=False)
        if not ledger.runs:
            raise ValueError(f"{self.out} holds no finished run to report: run the study first, without --report")
        text = open_text(self.study, self.out, make=False)
        held = lock.take(self.out, read.frozen(self.study), text.dataset.fingerprint, begun=True)
        state = plan(self.study, ledger.runs)
        self._conclude(state, ledger, timing.read(self.study, state, self.out), text, held)

    def run(self) -> None:
        """Make runs, time updates, write results and report."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise ValueError(f"{self.out} cannot be made a folder ({problem.strerror}): choose another --out") from None
        with occupied(self.out, f"the study in {self.out} is being advanced"):
            text = open_text(self.study, self.out, note=self.say)
            ledger = Ledger(self.out, note=self.say)
            held = lock.take(self.out, read.frozen(self.study), text.dataset.fingerprint, begun=bool(ledger.runs))
            loan = None
            if self.settings.reuse is not None:
                loan = Loan(self.study, ledger, held, self.settings.reuse)
                taken = loan.take()
                held = self._tested(held, taken)
                self.say(f"{len(taken)} runs taken from {self.settings.reuse}")
            state = plan(self.study, ledger.runs)
            if not state.done:
                imports(self.study)
            (self.out / outcome.STUDY).write_text(self.file, encoding="utf-8")
            if not state.done:
                state, held = self._advance(ledger, text, held, loan)
            if state.done:  # entries that were taken out again have left halves of runs
                shutil.rmtree(self.out / "work", ignore_errors=True)
            costs = self._time(state, text) if state.done else timing.read(self.study, state, self.out)
            self._conclude(state, ledger, costs, text, held)

    def _tested(self, held: lock.Lock, specs: Sequence[RunSpec]) -> lock.Lock:
        """From the first run on of an optimizer that is judged, its study is held to what it was then."""
        if all(spec.optimizer == self.study.race.baseline for spec in specs):
            return held
        return lock.note_test(self.out, held, self.settings.study)

    def _advance(self, ledger: Ledger, text: StudyText, held: lock.Lock, loan: Loan | None) -> tuple[Plan, lock.Lock]:
        def before(spec: RunSpec) -> None:
            nonlocal held
            held = self._tested(held, [spec])

        gpus, workers, threads = self._machine()
        job = Job(
            study=self.study,
            data=text.dataset.folder,
            fingerprint=text.dataset.fingerprint,
            work=self.out / "work",
            threads=threads,
        )
        self.say(f"study {self.study.name}: {len(ledger.runs)} runs finished, {workers} at a time; Ctrl-C pauses")
        signals = Signals()
        with signals.caught(), Progress(self.console, self.study) as progress:
            pool = Pool(job, workers=workers, gpus=gpus, note=progress.note)
            state = advance(
                self.study, ledger, pool, progress, signals, minutes=self.settings.minutes, before=before, loan=loan
            )
        if signals.received:
            self.say(
                f"{signal_name(signals.received)}: stopped with {len(ledger.runs)} finished runs, which are kept; "
                "the same command goes on"
            )
            raise SystemExit(_SIGNALLED + signals.received)
        return state, held

    def _machine(self) -> tuple[list[str], int, int]:
        """GPUs, one for each worker; workers; threads of each."""
        wanted, threads = self.settings.workers, self.settings.threads or 1
        device = pick_device(self.study.machine.device).type
        if device != "cuda":
            return [], wanted or (max(1, usable_cores() // threads) if device == "cpu" else 1), threads
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
        if wanted is not None and wanted > len(gpus):
            raise ValueError(f"workers is {wanted}, but each run has a GPU of its own, and there are {len(gpus)}")
        return gpus[:wanted], wanted or len(gpus), threads

    def _time(self, state: Plan, text: StudyText) -> list[Cost]:
        gpus, workers, _ = self._machine()
        place = timing.Place(data=text.dataset.folder, out=self.out, processes=1 if gpus else workers)
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            with self.console.status("timing") as status:
                return timing.measure(self.study, state, place, status.update)
        except (KeyboardInterrupt, _Terminated) as stop:
            received = signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT
            self.say(
                f"{signal_name(received)}: stopped; all runs are finished and kept, and the same command goes on with "
                "the timing"
            )
            raise SystemExit(_SIGNALLED + received) from None
        finally:
            signal.signal(signal.SIGTERM, before)

    def _conclude(self, state: Plan, ledger: Ledger, costs: Sequence[Cost], text: StudyText, held: lock.Lock) -> None:
        found, paths = outcome.write(
            self.study, state, ledger, costs, file=self.file, text=text, committed=held.committed, out=self.out
        )
        self.say(found["verdict"])
        for flag in found["flags"]:
            self.say(f"  note: {flag}")
        if not state.done:
            self.say(
                f"{len(ledger.runs)} runs finished, about {state.steps_left} updates to go: the same command goes on"
            )
        self.say("results: " + "  ".join(map(str, paths)))
        if self.settings.json:
            answer = {
                "study": self.study.name,
                "out": str(self.out),
                "finished_runs": len(ledger.runs),
                "steps_left": state.steps_left,
                "complete": found["complete"],
                "verdict": found["verdict"],
                "flags": found["flags"],
                "files": [str(path) for path in paths],
            }
            print(json.dumps(answer))


class _Terminated(BaseException):
    """SIGTERM came."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Terminated
