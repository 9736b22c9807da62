"""`sophia train`: settings from a file and the command line, a run from its start or its last checkpoint."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro
from rich.console import Console

from sophia import checkpoint, reference
from sophia.config import TrainSettings, read_toml
from sophia.display import Display
from sophia.distributed import World, world
from sophia.guards import Signals
from sophia.metrics import Metrics
from sophia.micro_batch import memory_told
from sophia.plot_run import draw_run
from sophia.rank_errors import ending_together, many, told_once
from sophia.run import RunFolder
from sophia.session import Session, resume, start
from sophia.train import Outcome, Trainer, signal_name

_SIGNALLED = 128  # plus the signal's number: the exit code by which shells tell it


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a GPT-2 on data that sophia prepare wrote.

    Settings come from the preset of the model, then from --config, then from the command line. On several GPUs:
    torchrun --nproc-per-node=N -m sophia train …
    """

    config: Path | None = None
    """TOML file of settings, as the config.toml of a run folder is."""
    resume: Path | None = None
    """Run folder to continue from its last checkpoint, bit for bit as if it had never stopped. Only settings that do
    not change what is learned may be given with it."""
    check_reference: bool = False
    """Train the runs that ship with sophia, and say whether this machine reproduces their losses step by step."""
    json: bool = False
    """Print the outcome as JSON."""
    settings: tyro.conf.OmitArgPrefixes[TrainSettings] = field(default_factory=TrainSettings)


def main(arguments: Sequence[str]) -> None:
    """Run `sophia train ARGUMENTS`.

    Raises:
        ValueError, OSError: What the user did cannot work; the message says why and what helps.
        SystemExit: Training was ended by a signal, or the help was asked for.
    """
    with ending_together():
        with told_once():
            command = tyro.cli(
                TrainCommand,
                prog="sophia train",
                args=list(arguments),
                default=TrainCommand(settings=_defaults(arguments)),
            )
        if command.check_reference and many():
            raise ValueError("check_reference is about one process: start it without torchrun")
        if command.check_reference:
            reference.check(as_json=command.json)
        else:
            train(command)


def train(command: TrainCommand) -> None:
    """Train as the command says."""
    console = Console(stderr=command.json)
    signals = Signals()
    with world(command.settings.machine.device) as here, signals.caught(), contextlib.ExitStack() as held:

        def note(text: str) -> None:
            if here.main:
                console.print(text, highlight=False, soft_wrap=True)

        session = _session(command, here, note, held)
        if here.main:
            console.print(describe(session), highlight=False, soft_wrap=True)
        outcome = _run(session, console, signals)
        if here.main:
            _conclude(session, outcome, console, as_json=command.json)
    if outcome.signal:
        raise SystemExit(_SIGNALLED + outcome.signal)


def _session(command: TrainCommand, here: World, note: "reference.Note", held: contextlib.ExitStack) -> Session:
    """The run, out of bounds for other processes until ``held`` is closed."""
    if command.resume is None:
        session = start(command.settings, here, note)
        _occupy(session.folder, here, held)
        return session
    if command.settings.out != command.resume:
        raise ValueError(f"--out {command.settings.out}: a resumed run stays in its folder; leave --out away")
    _occupy(RunFolder(command.resume), here, held)
    return resume(command.resume, command.settings, here, note)


def _occupy(folder: RunFolder, here: World, held: contextlib.ExitStack) -> None:
    here.everywhere(lambda: held.enter_context(folder.occupied()) if here.main else None)


def _run(session: Session, console: Console, signals: Signals) -> Outcome:
    steps = session.settings.schedule.steps
    assert steps is not None
    first = 0 if session.resumed is None else session.resumed.step
    with (
        Display(console if session.here.main else None, total_steps=steps, start_step=first) as display,
        Metrics(
            session.folder.path,
            resume_step=None if session.resumed is None else first,
            unseen=0 if session.resumed is None else len(session.resumed.state["progress"].get("unseen", ())),
            track=session.settings.logging.track,
            enabled=session.here.main,
        ) as metrics,
        memory_told(session),
    ):
        return Trainer(session, display, metrics, signals, display.note).run()


def _conclude(session: Session, outcome: Outcome, console: Console, *, as_json: bool) -> None:
    path, steps = session.folder.path, session.settings.schedule.steps
    plot = draw_run(path)
    if as_json:
        found = outcome.evaluation
        answer = {"run": str(path), "step": outcome.step, "steps": steps, "val_loss": found and found.loss}
        print(json.dumps(answer))
    if outcome.signal:
        saved = (checkpoint.steps(session.folder.checkpoints) or [0])[-1]
        console.print(
            f"{signal_name(outcome.signal)}: stopped after step {outcome.step} of {steps}, with a checkpoint of step "
            f"{saved}; go on with\n  sophia train --resume {path}",
            highlight=False,
            soft_wrap=True,
        )
        return
    if outcome.evaluation is not None:
        result = outcome.evaluation
        console.print(
            f"validation loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.2f}, "
            f"{result.bits_per_byte:.4f} bits a byte, after {steps} steps",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(f"nothing left to do: the run was finished after step {outcome.step}", highlight=False)
    console.print(f"run folder: {path}   plot: {plot}", highlight=False, soft_wrap=True)


def describe(session: Session) -> str:
    """Two lines about what is about to happen."""
    chosen, stepper = session.settings, session.stepper
    size = sum(p.numel() for p in session.model.parameters())
    ranks = f" on {session.here.size} ranks" if session.here.size > 1 else ""
    accumulated = -(-len(stepper.rows) // stepper.micro_batch)
    begun = f", going on after step {session.resumed.step}" if session.resumed is not None else ""
    return (
        f"{chosen.model.model}, {size / 1e6:.1f} M parameters, on {session.here.device.type}{ranks}; "
        f"{chosen.optimizer.optimizer}, peak learning rate {chosen.optimizer.lr:g}\n"
        f"{chosen.schedule.steps} steps of {chosen.batch.tokens_per_step} tokens "
        f"({f'{accumulated} times ' if accumulated > 1 else ''}{stepper.micro_batch} sequences of "
        f"{session.config.context}{' on each rank' if ranks else ''}); data: "
        f"{session.dataset.train.tokens / 1e6:.1f} M tokens, vocabulary {session.dataset.vocab_size}{begun}"
    )


def _defaults(arguments: Sequence[str]) -> TrainSettings:
    """What holds where the command line says nothing else: the file's or the run's settings."""
    config, run = _value(arguments, "--config"), _value(arguments, "--resume")
    if config is not None and run is not None:
        raise ValueError("--config and --resume: a resumed run has its settings in its own folder; leave --config out")
    if run is not None:
        return replace(RunFolder(Path(run)).settings(), out=Path(run))
    return TrainSettings() if config is None else read_toml(Path(config))


def _value(arguments: Sequence[str], flag: str) -> str | None:
    for place, argument in enumerate(arguments):
        if argument == flag and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith(flag + "="):
            return argument.partition("=")[2]
    return None
