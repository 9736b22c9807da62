"""`sophia bench memory`: the peak memory of training steps, as `sophia plan` estimates it and as it is.

Each case runs in a process of its own: the trainer's step, three times, with a curvature estimate in the first and the
third. Measured is, on the CPU, the highest resident memory less what was resident before the model was built (after a
step of a small one, which loads the libraries), on CUDA the most that PyTorch's allocator had handed out.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sophia import bench_memory_loss, machine, peak_memory
from sophia.bench_result import publish
from sophia.config import OptimizerSettings
from sophia.distributed import World
from sophia.memory import step_memory
from sophia.model import GPT, GPTConfig
from sophia.optimizers import Optimizers
from sophia.presets import default_curvature, preset
from sophia.step import Stepper

_STEPS = 3
_CURVATURE_INTERVAL = 2  # in place of 10: the same memory in fewer steps
_WITHIN = 0.15


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training set-up."""

    model: str
    """Preset."""
    vocab_size: int
    """Rows of the head."""
    micro_batch: int
    """Sequences in one forward pass."""
    rows: int
    """Sequences in a step."""
    optimizer: str
    """Its name in the preset."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward pass."""
    checkpointing: bool = False
    """Activation checkpointing."""

    @property
    def config(self) -> GPTConfig:
        """The model."""
        return preset(self.model).config(self.vocab_size, activation_checkpointing=self.checkpointing)

    @property
    def curvature(self) -> tuple[int, int]:
        """Rows and chunks of a curvature estimate, as the trainer has them by default."""
        return default_curvature(self.rows)

    def estimate(self, device: str) -> dict[str, Any]:
        """What `sophia plan` says."""
        rows, chunks = self.curvature
        by_mean = self.optimizer == "sophia-h"
        estimate = step_memory(
            self.config,
            micro_batch=self.micro_batch,
            optimizer=self.optimizer,
            precision=self.precision,
            device=device,
            accumulates=self.rows > self.micro_batch,
            curvature_rows=min(rows, self.micro_batch) if by_mean else -(-rows // chunks),
            curvature_chunks=-(-rows // self.micro_batch) if by_mean else chunks,
        )
        return {**dataclasses.asdict(estimate), "total": estimate.total}


CPU_CASES = (
    Case(model="nano", vocab_size=1024, micro_batch=16, rows=16, optimizer="adamw"),
    Case(model="nano", vocab_size=1024, micro_batch=64, rows=64, optimizer="sophia-g"),
    Case(model="micro", vocab_size=8192, micro_batch=8, rows=32, optimizer="adamw"),
    Case(model="micro", vocab_size=8192, micro_batch=8, rows=32, optimizer="sophia-g"),
    Case(model="micro", vocab_size=8192, micro_batch=8, rows=32, optimizer="lion", precision="bf16"),
    Case(model="micro", vocab_size=8192, micro_batch=8, rows=16, optimizer="muon", checkpointing=True),
    Case(model="micro", vocab_size=8192, micro_batch=4, rows=16, optimizer="sophia-h"),
    Case(model="30m", vocab_size=50304, micro_batch=1, rows=2, optimizer="adamw"),
    Case(model="30m", vocab_size=50304, micro_batch=2, rows=2, optimizer="sophia-g", precision="bf16"),
    Case(model="gpt2-small", vocab_size=50304, micro_batch=1, rows=2, optimizer="adamw"),
    Case(model="gpt2-small", vocab_size=50304, micro_batch=2, rows=2, optimizer="sophia-g", checkpointing=True),
)
CUDA_CASES = (
    Case(model="30m", vocab_size=50304, micro_batch=16, rows=32, optimizer="adamw", precision="bf16"),
    Case(model="gpt2-small", vocab_size=50304, micro_batch=8, rows=16, optimizer="adamw"),
    Case(model="gpt2-small", vocab_size=50304, micro_batch=16, rows=32, optimizer="adamw", precision="bf16"),
    Case(model="gpt2-small", vocab_size=50304, micro_batch=16, rows=32, optimizer="sophia-g", precision="bf16"),
    Case(model="gpt2-small", vocab_size=50304, micro_batch=16, rows=32, optimizer="lion", precision="bf16"),
    Case(model="gpt2-small", vocab_size=50304, micro_batch=16, rows=32, optimizer="muon", precision="bf16"),
    Case(model="gpt2-small", vocab_size=50304, micro_batch=2, rows=16, optimizer="sophia-h", precision="bf16"),
    Case(
        model="gpt2-medium",
        vocab_size=50304,
        micro_batch=32,
        rows=64,
        optimizer="sophia-g",
        precision="bf16",
        checkpointing=True,
    ),
    Case(model="gpt2-large", vocab_size=50304, micro_batch=4, rows=8, optimizer="sophia-g", precision="bf16"),
)


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """Settings of `sophia bench memory`."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train; each has its own list of cases."""
    only: str | None = None
    """Run the cases of this preset only."""
    loss: bool = False
    """Compare the chunked loss with the plain one instead: memory and time at 8 x 1024 predictions of 50304 ids."""
    out: Path | None = None
    """Write the result to this JSON file."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no CUDA device here: use --device cpu")
        if self.loss and self.only is not None:
            raise ValueError(f"only is {self.only!r}, but the loss is compared without a preset: leave one of both out")
        if not self.cases:
            known = ", ".join(dict.fromkeys(case.model for case in _cases(self.device)))
            raise ValueError(f"only is {self.only!r}, but the cases on {self.device} are of {known}")

    @property
    def cases(self) -> list[Case]:
        """What is to be measured."""
        return [case for case in _cases(self.device) if self.only in (None, case.model)]


def memory(settings: Annotated[MemorySettings, tyro.conf.arg(name="")]) -> None:
    """Measure the peak memory of training steps beside the estimate of `sophia plan`."""
    console = Console(stderr=settings.json)
    if settings.loss:
        found = bench_memory_loss.compare(settings.device, console)
        publish(found, bench_memory_loss.table, console, out=settings.out, as_json=settings.json)
        return
    rows = [
        measure(case, settings.device)
        for case in track(settings.cases, description="training in fresh processes", console=console, transient=True)
    ]
    result = {"bench": "memory", "device": settings.device, "machine": machine.describe(), "results": rows}
    publish(result, _table, console, out=settings.out, as_json=settings.json)


def measure(case: Case, device: str) -> dict[str, Any]:
    """Run one case in a process of its own: {"case", "estimate", "measured" (bytes), "ratio"}."""
    words = json.dumps({**dataclasses.asdict(case), "device": device})
    program = "import sys; from sophia.bench_memory import work; work(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"the case {words} failed with exit code {done.returncode}; its own message is above")
    measured = json.loads(done.stdout.splitlines()[-1])["peak"]
    estimate = case.estimate(device)
    return {
        "case": dataclasses.asdict(case),
        "estimate": estimate,
        "measured": measured,
        "ratio": estimate["total"] / measured,
    }


def work(words: str) -> None:
    """The other process: train, and print the peak as JSON."""
    settings = json.loads(words)
    device = torch.device(settings.pop("device"))
    case = Case(**settings)
    # A small model, yet with a million numbers: from there on Sophia's kernel is compiled.
    shape: dict[str, Any] = {"vocab_size": 1 << 16, "context": 8, "layers": 1, "heads": 2, "width": 16}
    tiny = GPTConfig(**shape, activation_checkpointing=case.checkpointing)
    _train(tiny, dataclasses.replace(case, rows=4, micro_batch=2), device)
    before = peak_memory.now(device)
    peak_memory.reset(device)
    _train(case.config, case, device)
    print(json.dumps({"peak": peak_memory.peak(device) - before}))


def _train(config: GPTConfig, case: Case, device: torch.device) -> None:
    """A few steps as the trainer takes them."""
    model = GPT(config).to(device)
    recipe: dict[str, Any] = dict(preset(case.model).recipes[case.optimizer])
    if case.optimizer.startswith("sophia"):
        rows, chunks = case.curvature
        recipe |= {"curvature_rows": rows, "curvature_interval": _CURVATURE_INTERVAL}
        recipe |= {"curvature_chunks": chunks} if case.optimizer in ("sophia-g", "sophia-k") else {}
    optimizers = Optimizers(OptimizerSettings(optimizer=case.optimizer, **recipe), model, seed=0)
    stepper = Stepper(
        model=model,
        optimizers=optimizers,
        here=World(rank=0, size=1, device=device),
        rows=range(case.rows),
        total_rows=case.rows,
        micro_batch=case.micro_batch,
        max_grad_norm=1.0,
        seed=0,
        autocast=functools.partial(_autocast, device, case.precision),
    )
    tokens = torch.randint(0, config.vocab_size, (case.rows, config.context), device=device)
    for index in range(_STEPS):
        stepper.refresh(tokens, tokens)
        stepper.gradients(tokens, tokens, index=index)
        stepper.clip()
        optimizers.step()


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _cases(device: str) -> tuple[Case, ...]:
    return CUDA_CASES if device == "cuda" else CPU_CASES


def _table(result: dict[str, Any]) -> Table:
    made, rows = result["machine"], result["results"]
    good = sum(abs(row["ratio"] - 1) <= _WITHIN for row in rows)
    table = Table(
        title="Peak memory of a training step",
        caption=f"{good} of {len(rows)} estimates within {_WITHIN:.0%} of what was measured; "
        f"{made['gpu'] or made['cpu']}, {made['threads']} threads, torch {made['torch']}",
    )
    for heading in ("training step", "peak at"):
        table.add_column(heading)
    for heading in ("plan, MiB", "measured, MiB", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        case, estimate = row["case"], row["estimate"]
        words = [case["model"], f"{case['micro_batch']} of {case['rows']} rows", case["optimizer"], case["precision"]]
        table.add_row(
            ", ".join([*words, *(["checkpointing"] if case["checkpointing"] else [])]),
            estimate["moment"],
            f"{estimate['total'] / 2**20:.0f}",
            f"{row['measured'] / 2**20:.0f}",
            f"{row['ratio']:.2f}",
        )
    return table
