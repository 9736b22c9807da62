"""Tiny training runs by the real trainer, alone or on ranks, and what is left of them."""

import contextlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from sophia import checkpoint
from sophia.config import (
    BatchSettings,
    CheckpointSettings,
    EvaluationSettings,
    LoggingSettings,
    MachineSettings,
    ModelSettings,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
)
from sophia.data.shards import write_dataset
from sophia.data.tokenizer import byte_tokenizer
from sophia.display import Display
from sophia.distributed import world
from sophia.guards import Signals
from sophia.metrics import Metrics
from sophia.run import RunFolder
from sophia.session import resume, start
from sophia.train import Trainer

STEPS, CONTEXT, ROWS = 7, 8, 12
MAX_GRAD_NORM = 0.5
# What two runs never share.
TIMES = ("elapsed_seconds", "tokens_per_second")


def write_data(folder):
    """Documents in which most ids follow from the one before."""
    draw = np.random.default_rng(0)
    documents = []
    for _ in range(12):
        first, noise = draw.integers(0, 64), draw.integers(0, 64, 120)
        documents.append(np.where(draw.random(120) < 0.2, noise, (np.arange(120) * 5 + first) % 64))
    write_dataset(folder, byte_tokenizer(), train=documents[2:], validation=documents[:2], shard_tokens=500)
    return folder


def settings(data, out, optimizer="sophia-g", *, parallel="ddp", micro_batch=2, precision="fp32", **chosen):
    """12 rows a step: micro-batches of 2 are six passes on one rank, three on two, one and a half on four."""
    if optimizer.startswith("sophia"):
        # Large enough that both clipped and unclipped coordinates are common.
        chosen = {"gamma": 2.0, "curvature_interval": 3, **chosen}
    return TrainSettings(
        data=data,
        out=out,
        model=ModelSettings(layers=2, heads=2, width=8, context=CONTEXT),
        optimizer=OptimizerSettings(optimizer=optimizer, max_grad_norm=MAX_GRAD_NORM, **chosen),
        schedule=ScheduleSettings(steps=STEPS, warmup_steps=2),
        batch=BatchSettings(tokens_per_step=ROWS * CONTEXT, micro_batch=micro_batch, seed=5),
        # Five windows: not a multiple of the ranks.
        evaluation=EvaluationSettings(eval_interval=3, eval_windows=5),
        logging=LoggingSettings(log_interval=1),
        checkpoints=CheckpointSettings(checkpoint_interval=4, keep_last=2),
        machine=MachineSettings(device="cpu", precision=precision, compile="off", parallel=parallel),
    )


def run(chosen, resumed=False, double=True, nodes=None):
    """Train as the settings say, in whatever world this process is in; returns what this rank was told.

    In float64 by default: then the order of sums, which is all that may differ between ranks, moves the numbers so
    little that no mistake hides below the tolerance. "hsdp" is on two nodes, if nothing else is said.
    """
    notes = []
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    try:
        with on_nodes(nodes or (2 if chosen.machine.parallel == "hsdp" else 1)), world("cpu") as here:
            session = resume(chosen.out, chosen, here, notes.append) if resumed else start(chosen, here, notes.append)
            first = session.resumed.step if session.resumed is not None else None
            with (
                Display(None, total_steps=STEPS, start_step=first or 0) as display,
                Metrics(session.folder.path, resume_step=first, enabled=here.main) as metrics,
            ):
                Trainer(session, display, metrics, Signals(), notes.append).run()
    finally:
        torch.set_default_dtype(before)
    return notes


@contextlib.contextmanager
def on_nodes(number):
    """Pretend that the ranks are on so many nodes, as torchrun tells them."""
    if number > 1:
        os.environ["LOCAL_WORLD_SIZE"] = str(torch.distributed.get_world_size() // number)
    try:
        yield
    finally:
        os.environ.pop("LOCAL_WORLD_SIZE", None)


def written(folder):
    """The lines of metrics.jsonl, which a run in motion may not have begun yet."""
    path = Path(folder) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def metrics(folder):
    """The same without times."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in written(folder)]


def interrupted(folder, copy):
    """A copy of a finished run as it was after the checkpoint of step 4; its settings."""
    shutil.copytree(folder, copy)
    shutil.rmtree(checkpoint.path_of(copy / "checkpoints", STEPS))
    assert checkpoint.steps(copy / "checkpoints") == [4]
    return replace(RunFolder(copy).settings(), out=copy)


def tensors(folder, name="model"):
    return load_file(checkpoint.choose(Path(folder) / "checkpoints") / f"{name}.safetensors")


def assert_close(folder, other, **tolerance):
    """Every number of both runs: the metrics of all steps, the last weights and the optimizers' state."""
    ours, theirs = metrics(folder), metrics(other)
    assert [sorted(line) for line in ours] == [sorted(line) for line in theirs]
    for line, expected in zip(ours, theirs, strict=True):
        for key, value in expected.items():
            what = f"{key} of step {expected['step']}"
            if isinstance(value, float):
                torch.testing.assert_close(line[key], value, **tolerance, msg=lambda m, w=what: f"{w}: {m}")
            else:
                assert line[key] == value, what
    for kind in ("model", "optimizer"):
        found, wanted = tensors(folder, kind), tensors(other, kind)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
