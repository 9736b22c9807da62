"""A training session: everything that a run needs, built from its settings, fresh or from a checkpoint."""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sophia import __version__, checkpoint, micro_batch, snapshot
from sophia.config import CHANGEABLE, TrainSettings, differences, write_toml
from sophia.data.loader import Batches, ValidationWindows, validation_windows
from sophia.data.shards import Dataset
from sophia.distributed import World, spread
from sophia.hf_tokenizer import check_tokenizer
from sophia.import_hf import import_gpt2
from sophia.model import GPT, GPTConfig
from sophia.optimizers import Optimizers
from sophia.resolve import model_config, resolve, rows_per_step
from sophia.run import RunFolder
from sophia.step import Stepper

Note = Callable[[str], None]

_GRAPHS = 64


@dataclass(kw_only=True)
class Session:
    """A run in progress."""

    settings: TrainSettings
    """Nothing left open."""
    folder: RunFolder
    """Where its files go."""
    here: World
    """The ranks."""
    dataset: Dataset
    """What it learns from."""
    config: GPTConfig
    """The model's shape."""
    model: nn.Module
    """The model as the engine (DDP, FSDP2) calls it."""
    optimizers: Optimizers
    """What changes it."""
    stepper: Stepper
    """Computes gradients."""
    batches: Batches
    """Training text by number of the step."""
    validation: ValidationWindows
    """Text to evaluate on."""
    resumed: checkpoint.Checkpoint | None
    """What the run goes on from."""
    compiled: bool
    """Whether the model runs through torch.compile."""
    precision: torch.dtype
    """What forward passes compute in."""


def start(settings: TrainSettings, here: World, note: Note) -> Session:
    """A new run in a new folder.

    Raises:
        ValueError: The settings do not fit, or the folder exists. Nothing was written then.
    """
    dataset = _open(settings, here)
    asked = settings.optimizer.curvature_chunks
    settings = resolve(settings, dataset, here)
    folder = RunFolder(here.share(settings.out or _free_folder(settings)))
    here.everywhere(lambda: _refuse_existing(folder.path))  # all have looked before one makes it
    session = _build(settings, folder, here, dataset, None, note)
    _fit_chunks(session, asked)
    here.everywhere(lambda: _write_folder(session) if here.main else None)
    return session


def resume(path: Path, settings: TrainSettings, here: World, note: Note) -> Session:
    """Continue a run from its latest checkpoint, or from its start where a kill came before the first one.

    Args:
        path: The run folder.
        settings: The run's own, with what the command line changed.
        here: The ranks, as many as it had or others.
        note: Tells the user something.

    Raises:
        ValueError: The settings would make it another run, the data is other data, or the checkpoint is damaged.
    """
    folder = RunFolder(path)
    _refuse_changes(folder, settings)
    dataset = _open(settings, here)
    here.everywhere(lambda: checkpoint.clear_up(folder.checkpoints) if here.main else None)
    loaded = here.everywhere(lambda: _latest(folder))
    _refuse_different(f"the latest checkpoint in {path}", -1 if loaded is None else loaded.step, here)
    if loaded is None:
        note(f"{path} has no checkpoint yet: beginning from the start")
        if here.main:
            folder.metrics.unlink(missing_ok=True)
        return _build(resolve(settings, dataset, here), folder, here, dataset, None, note)
    if dataset.fingerprint != loaded.state["data"]:
        raise ValueError(
            f"{settings.data} is not the data that {path} was trained on (its fingerprint begins with "
            f"{dataset.fingerprint[:12]}, the run's with {loaded.state['data'][:12]}): give the original with --data, "
            "or start a new run"
        )
    # Where the first weights came from matters no more, and may be gone.
    settings = replace(settings, model=replace(settings.model, init_from=None))
    session = _build(resolve(settings, dataset, here), folder, here, dataset, loaded, note)
    for name, then, now in _other_conditions(loaded, session):
        note(f"resumed with {name} {now} instead of {then}: the run goes on, but not bit for bit")
    restore(session, loaded)
    return session


def restore(session: Session, loaded: checkpoint.Checkpoint) -> None:
    """Give model and optimizers the state of a checkpoint.

    Raises:
        ValueError: It is one of another model.
    """
    snapshot.load_weights(session.model, loaded.model)
    snapshot.load_optimizers(session.model, session.optimizers, loaded.optimizer, loaded.state["optimizers"])


def conditions(session: Session) -> dict[str, Any]:
    """What a bitwise resume needs to find again."""
    return {
        **_place(session),
        "micro_batch": session.stepper.micro_batch,
        "compile": session.compiled,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sophia": __version__,
    }


def _place(session: Session) -> dict[str, Any]:
    here = session.here
    device = torch.cuda.get_device_name() if here.device.type == "cuda" else here.device.type
    parallel = f" under {session.settings.machine.parallel}" if here.size > 1 else ""
    return {"ranks": f"{here.size}{parallel}", "device": device}


def _other_conditions(loaded: checkpoint.Checkpoint, session: Session) -> list[tuple[str, Any, Any]]:
    then, now = loaded.state["conditions"], conditions(session)
    return [(name, then.get(name), now[name]) for name in now if then.get(name) != now[name]]


def _refuse_changes(folder: RunFolder, settings: TrainSettings) -> None:
    for name, (old, new) in differences(folder.settings(), settings).items():
        if name not in CHANGEABLE:
            raise ValueError(
                f"{name} is {new}, but the run {folder.path} was started with {old}: leave it out, or start a new run "
                "with it"
            )


def _latest(folder: RunFolder) -> checkpoint.Checkpoint | None:
    if not checkpoint.steps(folder.checkpoints):
        return None
    return checkpoint.read(checkpoint.choose(folder.checkpoints))


def _open(settings: TrainSettings, here: World) -> Dataset:
    folder = settings.data
    if folder is None:
        raise ValueError("no data: give --data FOLDER, which sophia prepare wrote")
    dataset = here.everywhere(lambda: Dataset.open(folder))
    _refuse_different(f"the data in {folder}", dataset.fingerprint, here)
    return dataset


def _refuse_different(what: str, value: str | int, here: World) -> None:
    """Refuse ranks that see different files under one name, as nodes without a shared file system do."""
    values = here.gather(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise ValueError(f"{what} is not the same on ranks 0 and {rank}: give all nodes the same files")


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise ValueError(f"the run folder {path} exists: continue it with --resume {path}, or choose another --out")


def _free_folder(settings: TrainSettings) -> Path:
    base = f"{settings.model.model}-{settings.optimizer.optimizer.rpartition(':')[2]}"
    number = 1
    while (path := Path("runs") / f"{base}-{number}").exists():
        number += 1
    return path


def _write_folder(session: Session) -> None:
    """Make the run folder, whole or not at all."""
    path, chosen = session.folder.path, session.settings
    assert chosen.data is not None
    # Absolute, so that the run can be resumed from anywhere.
    foreign = chosen.model.init_from and chosen.model.init_from.resolve()
    chosen = replace(
        chosen, data=chosen.data.resolve(), out=path.resolve(), model=replace(chosen.model, init_from=foreign)
    )
    partial = RunFolder(path.with_name(f".{path.name}.partial"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial.path, ignore_errors=True)
        partial.path.mkdir()
        write_toml(chosen, partial.config)
        shutil.copyfile(session.dataset.folder / "tokenizer.json", partial.tokenizer)
        partial.path.rename(path)
    except OSError as problem:
        shutil.rmtree(partial.path, ignore_errors=True)
        raise OSError(
            f"the run folder {path} cannot be made ({problem.strerror}: {problem.filename}): choose another --out"
        ) from None


def _build(
    settings: TrainSettings,
    folder: RunFolder,
    here: World,
    dataset: Dataset,
    resumed: checkpoint.Checkpoint | None,
    note: Note,
) -> Session:
    config = model_config(settings, dataset)
    total = rows_per_step(settings)
    batches = Batches(dataset, context=config.context, rows=total, seed=settings.batch.seed)
    windows = validation_windows(dataset, context=config.context, limit=settings.evaluation.eval_windows)
    precision = _precision(settings.machine.precision, here.device)
    if settings.machine.deterministic:
        _make_deterministic()
    model = GPT(config, torch.Generator().manual_seed(settings.batch.seed)).to(here.device)
    if settings.model.init_from is not None and resumed is None:
        _load_foreign(model, settings.model.init_from, dataset)
    sharded = here.size > 1 and settings.machine.parallel != "ddp"
    if sharded:
        _refuse_shards(settings)
    compiled = compiles(settings, here.device, note)
    if compiled:
        # One graph for each shape, whatever was seen before: a resumed run must not compile differently, nor leave
        # another shape uncompiled. There are a few for training, for curvature and for evaluation.
        torch._dynamo.config.recompile_limit = _GRAPHS
        for part in model.blocks if sharded else [model]:
            part.compile(dynamic=False)
    # Sophia-H takes differences of gradients, for which parameters in bf16 are too coarse.
    gathered = torch.float32 if settings.optimizer.optimizer == "sophia-h" else precision
    engine = spread(model, here, settings.machine.parallel, gathered=gathered)
    optimizers = Optimizers(settings.optimizer, engine, seed=settings.batch.seed)
    own = here.rows(total)
    stepper = Stepper(
        model=engine,
        optimizers=optimizers,
        here=here,
        rows=own,
        total_rows=total,
        micro_batch=len(own) if settings.batch.micro_batch == "auto" else min(settings.batch.micro_batch, len(own)),
        max_grad_norm=settings.optimizer.max_grad_norm,
        seed=settings.batch.seed,
        autocast=functools.partial(_autocast, here.device.type, precision),
        compiled=compiled,
    )
    session = Session(
        settings=settings,
        folder=folder,
        here=here,
        dataset=dataset,
        config=config,
        model=engine,
        optimizers=optimizers,
        stepper=stepper,
        batches=batches,
        validation=windows,
        resumed=resumed,
        compiled=compiled,
        precision=precision,
    )
    if settings.batch.micro_batch == "auto":
        stepper.micro_batch = _kept_micro_batch(session) or _largest_micro_batch(session)
    return session


def _refuse_shards(settings: TrainSettings) -> None:
    reasons = {
        "muon": "on shards torch's Muon adds in bfloat16, in an order that depends on the ranks",
        "soap": "it needs whole matrices",
    }
    name = settings.optimizer.optimizer
    reason = "what it makes of shards is not known" if settings.optimizer.is_foreign else reasons.get(name)
    if reason is not None:
        raise ValueError(f"{name} cannot run under {settings.machine.parallel}: {reason}; choose --parallel ddp")


def _kept_micro_batch(session: Session) -> int | None:
    """What a resumed run had on the same kind of machine: another number would move its sums by a rounding."""
    then = {} if session.resumed is None else session.resumed.state["conditions"]
    same = {name: then.get(name) for name in ("ranks", "device")} == _place(session)
    kept: int | None = then["micro_batch"] if same else None
    return kept


def _largest_micro_batch(session: Session) -> int:
    """What fits the rank with the least memory."""
    here = session.here
    return min(here.gather(here.everywhere(lambda: micro_batch.largest(session.stepper, session))))


def _fit_chunks(session: Session, asked: int | None) -> None:
    """Make as many curvature chunks as keep each within a micro-batch; part of what the run is, so for new runs only.

    Raises:
        ValueError: Fewer were asked for.
    """
    chosen, size = session.settings.optimizer, session.stepper.micro_batch
    if chosen.curvature_chunks is None or chosen.curvature_rows is None:
        return
    needed = -(-chosen.curvature_rows // (size * session.here.size))
    if asked is not None and asked < needed:
        raise ValueError(
            f"curvature_chunks {asked} makes chunks of {-(-chosen.curvature_rows // asked)} sequences, and each rank "
            f"computes {size} at a time: choose at least {needed}, fewer --curvature-rows or a larger --micro-batch"
        )
    chosen = replace(chosen, curvature_chunks=max(chosen.curvature_chunks, needed))
    session.settings = replace(session.settings, optimizer=chosen)
    session.optimizers.settings = chosen


def _load_foreign(model: GPT, folder: Path, dataset: Dataset) -> None:
    check_tokenizer(folder, dataset.tokenizer())
    config, weights = import_gpt2(
        folder, bias=model.config.bias, dropout=model.config.dropout, padded_vocab_size=model.config.head_rows
    )
    if config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the model in {folder} has {config.vocab_size} token ids and the data {model.config.vocab_size}: prepare "
            "the data with that model's tokenizer"
        )
    snapshot.load_weights(model, weights)


def compiles(settings: TrainSettings, device: torch.device, note: Note) -> bool:
    """Whether to use torch.compile.

    Raises:
        ValueError: It was asked for and cannot work here.
    """
    wanted = settings.machine.compile
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return False
    obstacle = _compile_obstacle(device)
    if obstacle is None:
        return True
    if wanted == "on":
        raise ValueError(f"compile is on, but torch.compile cannot work here: {obstacle}; choose --compile off")
    note(f"without torch.compile: {obstacle}")
    return False


def _compile_obstacle(device: torch.device) -> str | None:
    if device.type == "mps":
        return "its support for MPS is incomplete"
    if device.type == "cuda":
        return None if torch.utils._triton.has_triton() else "triton is missing or does not know this GPU"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "cl"]
    return None if any(name and shutil.which(name) for name in compilers) else "there is no C++ compiler"


def _precision(wanted: str, device: torch.device) -> torch.dtype:
    if wanted == "auto":
        wanted = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def _autocast(device: str, precision: torch.dtype) -> AbstractContextManager[object]:
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device, precision)


def _make_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch asks for it
    torch.use_deterministic_algorithms(True)
