"""Reference curves: whether this machine trains as the one did on which sophia was released.

Two short nano runs on text that is generated here, by integer arithmetic alone, so that every machine has the same.
Their losses, step by step, ship with the package. Floating-point sums in another order (other threads, processors,
versions of torch) move them a little, and more with each step; a wrong kernel, a broken random number or a changed
default moves them a lot.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sophia import machine
from sophia.config import (
    BatchSettings,
    CheckpointSettings,
    EvaluationSettings,
    LoggingSettings,
    MachineSettings,
    OptimizerName,
    OptimizerSettings,
    ScheduleSettings,
    TrainSettings,
)
from sophia.data.shards import write_dataset
from sophia.data.tokenizer import byte_tokenizer
from sophia.display import Display
from sophia.distributed import world
from sophia.guards import Signals
from sophia.metrics import Metrics, read_metrics
from sophia.session import start
from sophia.train import Trainer

Note = Callable[[str], None]

OPTIMIZERS: tuple[OptimizerName, ...] = ("sophia-g", "adamw")
STEPS = 40
# Other threads and micro-batches moved no loss by more than 1e-6, and neither did compiled code; computing in bf16
# moved one by 7e-3, the other form of curvature noise by 5e-2.
TOLERANCE = 1e-4
# Settings that are not the preset's. A gamma so large that few coordinates are clipped, or the sign of the momentum
# alone would decide most of so short a run; for AdamW a learning rate at which these small batches do not throw it off
# course, since then it multiplies the smallest difference.
_CHANGES: dict[OptimizerName, dict[str, float]] = {"sophia-g": {"gamma": 20.0}, "adamw": {"lr": 2e-3}}

_WORDS = 400
_LONGEST_WORD = 9
_SUCCESSORS = 12
_DOCUMENTS = 120
_DOCUMENT_WORDS = 500


def generated_documents(count: int = _DOCUMENTS, seed: int = 0) -> Iterator[str]:
    """Texts of made-up words, each followed by one of a dozen others, frequent ones more often."""
    # numpy promises the raw stream of a bit generator for all its versions.
    letters = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64)).random_raw(_WORDS * (_LONGEST_WORD + 1))
    words = [_word(letters[index::_WORDS].tolist()) for index in range(_WORDS)]
    links = np.random.Philox(key=np.array([seed, 1], dtype=np.uint64)).random_raw(_WORDS * _SUCCESSORS) % _WORDS
    successors = links.reshape(_WORDS, _SUCCESSORS).tolist()
    for number in range(count):
        draws = np.random.Philox(key=np.array([seed, 2 + number], dtype=np.uint64)).random_raw(_DOCUMENT_WORDS).tolist()
        word, text = draws[0] % _WORDS, []
        for draw in draws:
            # The smaller of two draws: early successors are the likelier ones.
            word = successors[word][min(draw % _SUCCESSORS, (draw >> 32) % _SUCCESSORS)]
            text.append(words[word])
        yield " ".join(text) + "."


def settings(optimizer: OptimizerName, data: Path, out: Path) -> TrainSettings:
    """The run whose losses ship with the package."""
    changes: dict[str, Any] = _CHANGES.get(optimizer, {})
    return TrainSettings(
        data=data,
        out=out,
        optimizer=OptimizerSettings(optimizer=optimizer, **changes),
        schedule=ScheduleSettings(steps=STEPS),
        batch=BatchSettings(tokens_per_step=8 * 128, micro_batch=8),
        evaluation=EvaluationSettings(eval_interval=STEPS, eval_windows=8),
        logging=LoggingSettings(log_interval=1),
        checkpoints=CheckpointSettings(checkpoint_interval=STEPS),
        machine=MachineSettings(device="cpu", precision="fp32", compile="off"),
    )


def write_data(folder: Path) -> Path:
    """The generated text as a data folder."""
    tokenizer = byte_tokenizer()
    encoded = [np.array(tokenizer.encode(text).ids, dtype=np.uint16) for text in generated_documents()]
    write_dataset(folder, tokenizer, train=encoded[10:], validation=encoded[:10])
    return folder


def measure(optimizer: OptimizerName, data: Path, out: Path, **changes: Any) -> list[float]:
    """Train one reference run and return its losses, step by step; ``changes`` replace machine settings, for tests."""
    chosen = settings(optimizer, data, out)
    if "micro_batch" in changes:
        chosen = replace(chosen, batch=replace(chosen.batch, micro_batch=changes.pop("micro_batch")))
    chosen = replace(chosen, machine=replace(chosen.machine, **changes))
    with world("cpu") as here:
        session = start(chosen, here, lambda text: None)
        # Their order hangs on the data's fingerprint, and that on how the installed tokenizers writes its files.
        same = session.batches
        same.dataset = copy.copy(same.dataset)
        same.dataset.fingerprint = "reference"
        with Display(None, total_steps=STEPS, start_step=0) as display, Metrics(out, resume_step=None) as metrics:
            Trainer(session, display, metrics, Signals(), display.note).run()
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl").training]


def expected() -> dict[str, Any]:
    """What ships with the package: losses by optimizer, and the machine that they were measured on."""
    loaded: dict[str, Any] = json.loads(resources.files("sophia").joinpath("reference.json").read_text("utf-8"))
    return loaded


def record(path: Path) -> None:
    """Measure all reference runs anew and write them, to be shipped."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data")
        losses = {name: measure(name, data, Path(folder) / name) for name in OPTIMIZERS}
    machine.write_json(path, {"tolerance": TOLERANCE, "machine": machine.describe(), "losses": losses})


def check(*, as_json: bool) -> None:
    """Train the reference runs here, and print how far their losses are from those that ship.

    Raises:
        SystemExit: With 1 when a loss is further off than the tolerance.
    """
    console = Console(stderr=as_json)
    shipped = expected()
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data")
        for name in OPTIMIZERS:
            console.print(f"{name}: {STEPS} steps of a nano model …", highlight=False)
            results[name] = compare(shipped["losses"][name], measure(name, data, Path(folder) / name))
    if as_json:
        print(json.dumps({"tolerance": TOLERANCE, "machine": machine.describe(), "optimizers": results}))
    console.print(_table(results))
    where = shipped["machine"]
    origin = f"the one of the release ({where['cpu']}, torch {where['torch']}, {where['threads']} threads)"
    if any(result["largest"] > TOLERANCE for result in results.values()):
        console.print(
            f"This machine does not train as {origin}: a loss is off by more than {TOLERANCE:g}. Please report it with "
            "the output of sophia train --check-reference --json",
            highlight=False,
            soft_wrap=True,
        )
        raise SystemExit(1)
    exact = all(result["largest"] == 0 for result in results.values())
    how = "bit for bit" if exact else f"within {TOLERANCE:g} in every loss"
    console.print(f"This machine trains as {origin}, {how}.", highlight=False, soft_wrap=True)


def compare(shipped: Sequence[float], found: Sequence[float]) -> dict[str, Any]:
    """The largest deviation of a loss, where it is, and up to which step all are equal bit for bit."""
    off = [abs(a - b) if b is not None else float("inf") for a, b in zip(shipped, found, strict=True)]
    largest = max(off)
    first = next((step for step, by in enumerate(off, start=1) if by), None)
    return {"largest": largest, "at_step": off.index(largest) + 1, "first_different_step": first, "losses": list(found)}


def _table(results: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Deviation from the reference curves", title_justify="left")
    for heading in ("optimizer", "steps", "largest |difference|", "at step", "equal bit for bit up to step"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for name, result in results.items():
        first = result["first_different_step"]
        equal = STEPS if first is None else first - 1
        table.add_row(name, str(STEPS), f"{result['largest']:.2g}", str(result["at_step"]), str(equal))
    return table


def _word(draws: list[int]) -> str:
    length = 2 + draws[0] % (_LONGEST_WORD - 1)
    return "".join("etaoinshrdlucmfwypvbgk"[min(draw % 22, (draw >> 32) % 22)] for draw in draws[1 : length + 1])
