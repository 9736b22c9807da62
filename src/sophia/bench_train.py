"""`sophia bench train`: training steps of our GPT-2 and of transformers' on the same batches, in one interleaved run.

The yardstick is what people use today: transformers' GPT-2 with scaled_dot_product_attention and torch's fused AdamW,
compiled or not as ours is. The batches are random ids; what a step costs does not depend on them.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Sequence
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
from sophia.presets import preset
from sophia.step import Stepper

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
    """Tokens in a sequence; None is the preset's."""
    rows: int = 32
    """Sequences in a step."""
    micro_batch: int = 32
    """Sequences in one forward pass."""
    curvature_rows: int = 4
    """Sequences of the step from which Sophia estimates its curvature, one chunk each."""
    optimizers: tuple[OptimizerName, ...] = ("adamw", "sophia-g")
    """What trains our model."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where it is trained."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Under autocast to bf16, or plain."""
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
        for name in ("vocab_size", "rows", "micro_batch", "curvature_rows", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.curvature_rows > self.rows:
            raise ValueError(f"curvature_rows is {self.curvature_rows}, but a step has {self.rows} rows: choose fewer")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops is {self.peak_tflops}: it must be positive")


class _Logits(nn.Module):
    """A model of transformers that returns its logits alone, as ours does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids [batch, time] -> logits [batch, time, vocab]."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def train(settings: Annotated[TrainBenchSettings, tyro.conf.arg(name="")]) -> None:
    """Time training steps against transformers' GPT-2 with torch's fused AdamW."""
    console = Console(stderr=settings.json)
    publish(measure(settings, console), _table, console, out=settings.out, as_json=settings.json)


def measure(settings: TrainBenchSettings, console: Console) -> dict[str, Any]:
    """Run the rounds: {"settings", "machine", "results": {name: {"tokens_per_second", "ratio", "mfu", …}}}."""
    device = pick_device(settings.device)
    base = preset(settings.model)
    config = base.config(
        settings.vocab_size,
        context=settings.context or base.context,
        padded_vocab_size=padded_vocabulary(settings.vocab_size, 64),
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(settings.vocab_size, (settings.rows, config.context + 1), generator=generator).to(device)
    builders: dict[str, Callable[[], Stepper]] = {_YARDSTICK: functools.partial(_theirs, config, settings, device)}
    for optimizer in settings.optimizers:
        builders[f"ours, {optimizer}"] = functools.partial(_ours, config, settings, device, optimizer)
    steppers: dict[str, Stepper] = {}
    memory: dict[str, int | None] = {}
    for name, build in builders.items():
        console.print(f"warming up: {name}", highlight=False)
        before = _begin_memory(device)
        steppers[name] = build()
        _round(steppers[name], ids)
        memory[name] = _end_memory(device, before)
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in track(range(settings.rounds), description="timing rounds of ten steps", console=console, transient=True):
        for name, stepper in steppers.items():
            seconds[name].append(_timed(functools.partial(_round, stepper, ids), device))
    tokens = _STEPS * settings.rows * config.context
    flops = flops_per_token(config)
    return {
        "bench": "train",
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
        "machine": machine.describe(),
        "parameters": {name: sum(p.numel() for p in stepper.model.parameters()) for name, stepper in steppers.items()},
        "flops_per_token": flops,
        "results": {
            name: _summary(times, seconds[_YARDSTICK], tokens, flops, settings.peak_tflops, memory[name])
            for name, times in seconds.items()
        },
    }


def _theirs(config: GPTConfig, settings: TrainBenchSettings, device: torch.device) -> Stepper:
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
    return _stepper(_Logits(GPT2LMHeadModel(GPT2Config(**shape))).to(device), settings, device, "adamw")


def _ours(config: GPTConfig, settings: TrainBenchSettings, device: torch.device, optimizer: OptimizerName) -> Stepper:
    model = GPT(config, torch.Generator().manual_seed(0)).to(device)
    return _stepper(model, settings, device, optimizer)


def _stepper(model: nn.Module, settings: TrainBenchSettings, device: torch.device, optimizer: OptimizerName) -> Stepper:
    recipe: dict[str, Any] = dict(preset(settings.model).recipes[optimizer])
    if optimizer.startswith("sophia"):
        recipe["curvature_rows"] = settings.curvature_rows
    if optimizer == "sophia-g":
        recipe["curvature_chunks"] = settings.curvature_rows
    if settings.compile:
        model.compile(dynamic=False)
    optimizers = Optimizers(OptimizerSettings(optimizer=optimizer, **recipe), model, seed=0)
    optimizers.set_lr(0.01)  # the weights hardly matter, but must stay finite
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16)
    return Stepper(
        model=model,
        optimizers=optimizers,
        here=World(rank=0, size=1, device=device),
        rows=range(settings.rows),
        total_rows=settings.rows,
        micro_batch=settings.micro_batch,
        max_grad_norm=1.0,
        seed=0,
        autocast=autocast if settings.precision == "bf16" else contextlib.nullcontext,
    )


def _round(stepper: Stepper, ids: Tensor) -> None:
    inputs, targets = ids[:, :-1], ids[:, 1:]
    for index in range(_STEPS):
        stepper.refresh(inputs, targets)
        stepper.gradients(inputs, targets, index=index)
        stepper.clip()
        stepper.optimizers.step()


def _timed(run: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


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
        title=f"Training {settings['model']}: {settings['rows']} sequences a step, {settings['precision']}",
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
