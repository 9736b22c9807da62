"""`sophia bench train`: training steps of ours and of a plain loop around transformers' GPT-2, in one interleaved run.

The yardstick is the loop that people write: `model(input_ids, labels=...)` with its own loss, gradient clipping and
torch's fused AdamW, with scaled_dot_product_attention, on the same batches in the same precision, compiled or not as
ours is. The ids are random; what a step costs does not depend on them.
"""

import contextlib
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from sophia import machine
from sophia.accounting import flops_per_token
from sophia.bench_result import publish
from sophia.config import OptimizerName, OptimizerSettings
from sophia.distributed import World, pick_device
from sophia.model import GPT, GPTConfig, padded_vocabulary
from sophia.optimizers import Optimizers
from sophia.presets import default_curvature, preset
from sophia.step import Stepper
from sophia.timing import timed

# A round is as many steps as there are from one curvature estimate to the next, so that each round pays for one.
_STEPS = 10
_YARDSTICK = "transformers, adamw"


@dataclass(frozen=True, kw_only=True)
class TrainBenchSettings:
    """Settings of `sophia bench train`."""

    model: str = "gpt2-small"
    """Preset."""
    vocab_size: int = 50257
    """Token ids; our model pads them."""
    context: int | None = None
    """Tokens in a sequence; None is the preset's, on the CPU at most 256."""
    rows: int | None = None
    """Sequences in a step; None is 32, on the CPU 4."""
    micro_batch: int | None = None
    """Sequences in one forward pass; None is all of a step."""
    curvature_rows: int | None = None
    """Sequences of the step from which Sophia estimates its curvature, at most four chunks; None is what the trainer
    takes."""
    optimizers: tuple[OptimizerName, ...] = ("adamw", "sophia-g")
    """What trains our model."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where it is trained."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Under autocast to bf16, or plain; auto is bf16 on CUDA and fp32 elsewhere."""
    compile: bool = False
    """Compile all models with torch.compile."""
    rounds: int = 5
    """Rounds of ten steps, in which all take turns. The median is shown."""
    peak_tflops: float | None = None
    """Peak of the device in 10^12 operations a second at this precision, for model FLOPs utilisation: 989 for an H100
    or H200 at bf16 (NVIDIA's data sheet, dense)."""
    out: Path | None = None
    """Write the result to this JSON file."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    def __post_init__(self) -> None:
        """Refuse what cannot be timed."""
        for name in ("vocab_size", "context", "rows", "micro_batch", "curvature_rows", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if self.rows and self.curvature_rows and self.curvature_rows > self.rows:
            raise ValueError(f"curvature_rows is {self.curvature_rows}, but a step has {self.rows} rows: choose fewer")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops is {self.peak_tflops}: it must be positive")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What all of them do."""

    config: GPTConfig
    """Our model's shape."""
    device: torch.device
    """Where."""
    rows: int
    """Sequences in a step."""
    micro_batch: int
    """Sequences in one forward pass."""
    autocast: Callable[[], AbstractContextManager[object]]
    """Makes the context of a forward pass."""
    compile: bool
    """Whether models are compiled."""


class _PlainLoop:
    """The yardstick."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.model = _gpt2_of_transformers(job.config).to(job.device)
        if job.compile:
            self.model.compile(dynamic=False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=6e-6, betas=(0.9, 0.95), fused=True)

    def step(self, ids: Tensor, index: int) -> None:
        """Learn from ids [rows, context + 1], as far as the context goes."""
        self.optimizer.zero_grad()
        size = self.job.micro_batch
        parts = [ids[start : start + size, :-1] for start in range(0, len(ids), size)]
        for part in parts:
            with self.job.autocast():
                loss = self.model(input_ids=part, labels=part, use_cache=False).loss / len(parts)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


class _Ours:
    """The trainer's step."""

    def __init__(self, job: _Job, recipe: Mapping[str, Any], optimizer: OptimizerName) -> None:
        self.model = GPT(job.config, torch.Generator().manual_seed(0)).to(job.device)
        if job.compile:
            self.model.compile(dynamic=False)
        self.optimizers = Optimizers(OptimizerSettings(optimizer=optimizer, **recipe), self.model, seed=0)
        self.optimizers.set_lr(0.01)  # the weights hardly matter, but must stay finite
        self.stepper = Stepper(
            model=self.model,
            optimizers=self.optimizers,
            here=World(rank=0, size=1, device=job.device),
            rows=range(job.rows),
            total_rows=job.rows,
            micro_batch=job.micro_batch,
            max_grad_norm=1.0,
            seed=0,
            autocast=job.autocast,
            compiled=job.compile,
        )

    def step(self, ids: Tensor, index: int) -> None:
        """Learn from ids [rows, context + 1]."""
        inputs, targets = ids[:, :-1], ids[:, 1:]
        self.stepper.refresh(inputs, targets)
        self.stepper.gradients(inputs, targets, index=index)
        self.stepper.clip()
        self.optimizers.step()


def train(settings: Annotated[TrainBenchSettings, tyro.conf.arg(name="")]) -> None:
    """Time training steps against transformers' GPT-2 with torch's fused AdamW."""
    console = Console(stderr=settings.json)
    publish(measure(settings, console), _table, console, out=settings.out, as_json=settings.json)


def measure(settings: TrainBenchSettings, console: Console) -> dict[str, Any]:
    """Run the rounds: {"settings", "machine", "results": {name: {"tokens_per_second", "ratio", "mfu", …}}}."""
    job = _job(settings)
    device = job.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(settings.vocab_size, (job.rows, job.config.context + 1), generator=generator).to(device)
    builders: dict[str, Callable[[], _PlainLoop | _Ours]] = {_YARDSTICK: functools.partial(_PlainLoop, job)}
    for optimizer in settings.optimizers:
        recipe = _recipe(settings, optimizer, job.rows)
        builders[f"ours, {optimizer}"] = functools.partial(_Ours, job, recipe, optimizer)
    loops: dict[str, _PlainLoop | _Ours] = {}
    memory: dict[str, int | None] = {}
    for name, build in builders.items():
        console.print(f"warming up: {name}", highlight=False)
        before = _begin_memory(device)
        loops[name] = build()
        _round(loops[name], ids, steps=2)  # the first of which estimates curvature
        memory[name] = _end_memory(device, before)
        if name.startswith("ours, sophia"):
            _round(loops[name], ids, steps=_STEPS - 2)  # to the next estimate, with which a round begins
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in track(range(settings.rounds), description="timing rounds of ten steps", console=console, transient=True):
        for name, loop in loops.items():
            seconds[name].append(timed(functools.partial(_round, loop, ids), device))
    tokens = _STEPS * job.rows * job.config.context
    flops = flops_per_token(job.config)
    return {
        "bench": "train",
        "settings": {
            **{name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
            **{"device": device.type, "precision": _precision(settings, device), "context": job.config.context},
            **{"rows": job.rows, "micro_batch": job.micro_batch},
        },
        "machine": machine.describe(),
        "parameters": {name: sum(p.numel() for p in loop.model.parameters()) for name, loop in loops.items()},
        "flops_per_token": flops,
        "results": {
            name: _summary(times, seconds[_YARDSTICK], tokens, flops, settings.peak_tflops, memory[name])
            for name, times in seconds.items()
        },
    }


def _job(settings: TrainBenchSettings) -> _Job:
    device, base = pick_device(settings.device), preset(settings.model)
    on_cpu = device.type == "cpu"
    rows = settings.rows or (4 if on_cpu else 32)
    if settings.curvature_rows is not None and settings.curvature_rows > rows:
        raise ValueError(f"curvature_rows is {settings.curvature_rows}, but a step has {rows} rows: choose fewer")
    config = base.config(
        settings.vocab_size,
        context=settings.context or (min(256, base.context) if on_cpu else base.context),
        padded_vocab_size=padded_vocabulary(settings.vocab_size, 64),
    )
    low = _precision(settings, device) == "bf16"
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16)
    return _Job(
        config=config,
        device=device,
        rows=rows,
        micro_batch=min(settings.micro_batch or rows, rows),
        autocast=autocast if low else contextlib.nullcontext,
        compile=settings.compile,
    )


def _precision(settings: TrainBenchSettings, device: torch.device) -> str:
    if settings.precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    return settings.precision


def _recipe(settings: TrainBenchSettings, optimizer: OptimizerName, rows: int) -> dict[str, Any]:
    recipe: dict[str, Any] = dict(preset(settings.model).recipes[optimizer])
    wanted, chunks = default_curvature(rows)
    if settings.curvature_rows is not None:
        wanted, chunks = settings.curvature_rows, min(chunks, settings.curvature_rows)
    if optimizer.startswith("sophia"):
        recipe["curvature_rows"] = wanted
    if optimizer in ("sophia-g", "sophia-k"):
        recipe["curvature_chunks"] = chunks
    return recipe


def _gpt2_of_transformers(config: GPTConfig) -> nn.Module:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 - an extra
    except ModuleNotFoundError:
        raise ValueError("the yardstick needs transformers: pip install 'sophia-lm[hf]'") from None
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), config.vocab_size - 1),
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**shape)).train()
    vars(model)["loss_type"] = "ForCausalLM"  # the default; unless it is said, a note is printed
    return model


def _round(loop: _PlainLoop | _Ours, ids: Tensor, steps: int = _STEPS) -> None:
    for index in range(steps):
        loop.step(ids, index)


def _begin_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _end_memory(device: torch.device, before: int) -> int | None:
    """Bytes at the peak beyond those of the others; None where the device does not count (see sophia bench memory)."""
    return torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def _summary(
    times: Sequence[float],
    yardstick: Sequence[float],
    tokens: int,
    flops: int,
    peak_tflops: float | None,
    memory: int | None,
) -> dict[str, Any]:
    rate = tokens / statistics.median(times)
    return {
        "tokens_per_second": rate,
        # Of each round on its own: what slows the machine for a while slows both.
        "ratio": statistics.median(other / own for own, other in zip(times, yardstick, strict=True)),
        "mfu": None if peak_tflops is None else rate * flops / (peak_tflops * 1e12),
        "peak_bytes": memory,
        "seconds": list(times),
    }


def _table(result: dict[str, Any]) -> Table:
    settings = result["settings"]
    table = Table(
        title=f"Training {settings['model']}: {settings['rows']} x {settings['context']} tokens a step, "
        f"{settings['precision']}, {'compiled' if settings['compile'] else 'eager'}, {settings['device']}",
        title_justify="left",
    )
    for heading in ("", "tokens/s", "of transformers", "MFU", "peak memory"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in result["results"].items():
        mfu, peak = row["mfu"], row["peak_bytes"]
        table.add_row(
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['ratio']:.2f}x",
            "–" if mfu is None else f"{mfu:.1%}",
            "–" if peak is None else f"{peak / 2**30:.1f} GiB",
        )
    return table
