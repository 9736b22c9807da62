"""Tiny training runs through the command line, in this process, and how to tell whether two of them are equal."""

import json
import os
import threading
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from sophia import checkpoint, train_command
from sophia.cli import main
from sophia.data.shards import write_dataset
from sophia.data.tokenizer import byte_tokenizer
from sophia.step import Stepper

# Six sequences a step in micro-batches of four: the second one is a remainder.
SMALL = {
    "layers": 2,
    "heads": 2,
    "width": 16,
    "context": 16,
    "tokens-per-step": 96,
    "micro-batch": 4,
    "steps": 12,
    "warmup-steps": 2,
    "eval-interval": 4,
    "eval-windows": 5,
    "log-interval": 1,
    "checkpoint-interval": 5,
    "device": "cpu",
}
OPTIMIZERS = ("sophia-g", "sophia-h", "sophia-k", "adamw", "nadamw", "lion", "signum", "muon", "soap")
# Fields that hold times, which no two runs share.
TIMES = ("elapsed_seconds", "tokens_per_second")


def write_data(folder, *, seed=0, tokens=4000, shard_tokens=1500, tokenizer=None, largest=64):
    """Documents in which each id mostly follows from the one before: something can be learned."""
    draw = np.random.default_rng(seed)
    documents = []
    for _ in range(tokens // 200):
        noise = draw.integers(0, largest, 200)
        ids = np.where(draw.random(200) < 0.2, noise, (np.arange(200) * 5 + noise[0]) % largest)
        documents.append(ids)
    tokenizer = tokenizer or byte_tokenizer()
    write_dataset(folder, tokenizer, train=documents[2:], validation=documents[:2], shard_tokens=shard_tokens)
    return folder


def arguments(**flags):
    """Flags by name, `steps=3` or `eval_interval=3`; True is a bare flag, None leaves one out."""
    given = {**SMALL, **{name.replace("_", "-"): value for name, value in flags.items()}}
    return list(_written(given))


def _written(flags):
    for name, value in flags.items():
        if value is True:
            yield f"--{name}"
        elif value is not None:
            yield from (f"--{name}", str(value))


def sophia(*words):
    """Run a command as the shell does; returns its exit code."""
    try:
        return main([str(word) for word in words])
    except SystemExit as ended:
        return ended.code or 0
    finally:
        end_threads()


def end_threads():
    """What a process that ends takes with it: a checkpoint on its way would meet whoever goes on."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def train(data, out, **flags):
    return sophia("train", "--data", data, "--out", out, *arguments(**flags))


def resume(run, **flags):
    return sophia("train", "--resume", run, *_written({name.replace("_", "-"): v for name, v in flags.items()}))


def without_plots(monkeypatch):
    """Drawing takes longer than these runs; the subprocesses of test_kill.py draw."""
    monkeypatch.setattr(train_command, "draw_run", lambda folder: (folder / "loss.png").touch() or folder / "loss.png")


class Killed(BaseException):
    """Ends a run as abruptly as an exception can."""


def crashes(start, *args, **flags):
    """Whether a run that is started so crashes; else it must end well."""
    try:
        assert start(*args, **flags) == 0
    except Killed:
        return True
    return False


def through_crashes(data, out, **flags):
    """Train and resume, again and again, until nothing crashes."""
    if crashes(train, data, out, **flags):
        while crashes(resume, out):
            pass


def before_batch(monkeypatch, act):
    """Call act(index) before the gradients of every data batch are computed."""
    original = Stepper.gradients

    def gradients(self, inputs, targets, *, index):
        act(index)
        return original(self, inputs, targets, index=index)

    monkeypatch.setattr(Stepper, "gradients", gradients)


def crash_at(monkeypatch, *batches):
    """Crash once at each of these data batches."""
    left = set(batches)

    def act(index):
        if index in left:
            left.remove(index)
            raise Killed

    before_batch(monkeypatch, act)


def signal_at(monkeypatch, number, *batches):
    """Send this process a signal, once at each of these data batches."""
    left = set(batches)

    def act(index):
        if index in left:
            left.remove(index)
            os.kill(os.getpid(), number)

    before_batch(monkeypatch, act)


def metrics(run):
    """The lines of metrics.jsonl without times, as they stand in the file."""
    lines = []
    for line in (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        lines.append({key: value for key, value in record.items() if key not in TIMES})
    return lines


def state(folder):
    """state.json of a checkpoint without times."""
    content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    del content["progress"]["elapsed"]
    return content


def latest(run):
    return checkpoint.choose(Path(run) / "checkpoints")


def assert_equal(run, other):
    """Bit for bit: the last checkpoint and the metrics, but for times; and both drew their plot."""
    ours, theirs = latest(run), latest(other)
    assert ours.name == theirs.name
    checkpoint.verify(ours)
    checkpoint.verify(theirs)
    assert metrics(run) == metrics(other)
    assert state(ours) == state(theirs)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    for folder in (run, other):
        assert (Path(folder) / "loss.png").is_file()


def weights(run):
    return load_file(latest(run) / "model.safetensors")
