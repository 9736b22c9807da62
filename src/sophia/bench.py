"""`sophia bench step`: what one optimizer step costs beside torch's fused AdamW, in one interleaved run."""

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

from sophia import SophiaG, machine
from sophia.bench_result import publish

_REFERENCE = "AdamW fused"


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of `sophia bench step`."""

    layers: int = 12
    """Transformer blocks of the GPT-2 whose tensors are stepped."""
    width: int = 768
    """Size of its residual stream; 12 layers of 768 are GPT-2 124M with its 148 tensors."""
    vocab_size: int = 50257
    """Rows of its embedding."""
    rounds: int = 9
    """Rounds; in each every optimizer steps once, in turn. The median is shown."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the tensors are."""
    foreach: bool = False
    """Also time Sophia's foreach path on the CPU, which is slow there."""
    out: Path | None = None
    """Write the result to this JSON file."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    def __post_init__(self) -> None:
        """Refuse what cannot be timed."""
        for name in ("layers", "width", "vocab_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no CUDA device here: use --device cpu")


def step(settings: Annotated[StepSettings, tyro.conf.arg(name="")]) -> None:
    """Time one optimizer step of Sophia-G against torch's fused AdamW."""
    console = Console(stderr=settings.json)
    publish(measure(settings, console), _table, console, out=settings.out, as_json=settings.json)


def measure(settings: StepSettings, console: Console) -> dict[str, Any]:
    """Run the rounds: {"settings", "machine", "parameters", "results": {name: {"milliseconds", "ratio", …}}}."""
    shapes = gpt2_shapes(layers=settings.layers, width=settings.width, vocab_size=settings.vocab_size)
    contenders = _contenders(shapes, settings)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in track(range(settings.rounds + 1), description="timing steps", console=console, transient=True):
        for name, run in contenders.items():
            seconds[name].append(_timed(run, settings.device))
    for times in seconds.values():
        del times[0]  # the first round touches new memory and fills caches
    parameters = sum(torch.Size(shape).numel() for shape in shapes)
    return {
        "bench": "step",
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
        "machine": machine.describe(),
        "tensors": len(shapes),
        "parameters": parameters,
        "results": {name: _summary(seconds, name, parameters) for name in contenders},
    }


def gpt2_shapes(*, layers: int, width: int, vocab_size: int, context: int = 1024) -> list[tuple[int, ...]]:
    """The shapes of a GPT-2's parameters, with biases and a tied head."""
    block: list[tuple[int, ...]] = [
        *((width,), (width,)),  # norm
        *((3 * width, width), (3 * width,)),  # queries, keys and values
        *((width, width), (width,)),  # projection
        *((width,), (width,)),  # norm
        *((4 * width, width), (4 * width,)),
        *((width, 4 * width), (width,)),
    ]
    return [(vocab_size, width), (context, width), *block * layers, (width,), (width,)]


def _contenders(shapes: Sequence[tuple[int, ...]], settings: StepSettings) -> dict[str, Callable[[], object]]:
    device = torch.device(settings.device)
    generator = torch.Generator(device).manual_seed(0)

    def draw(scale: float) -> list[Tensor]:
        return [torch.randn(shape, generator=generator, device=device) * scale for shape in shapes]

    gradients = draw(1e-3)

    def parameters() -> list[nn.Parameter]:
        tensors = [nn.Parameter(t) for t in draw(0.02)]
        for p, gradient in zip(tensors, gradients, strict=True):
            p.grad = gradient
        return tensors

    def sophia(**path: bool) -> Callable[[], object]:
        optimizer = SophiaG(parameters(), lr=1e-6, **path)  # type: ignore[arg-type]
        # Random curvature of the size at which about half of the coordinates are clipped.
        optimizer.update_curvature([t.square() for t in draw(1.0)])
        return optimizer.step

    source, target = draw(1.0), draw(1.0)

    def copy() -> None:
        for a, b in zip(source, target, strict=True):
            b.copy_(a)

    contenders: dict[str, Callable[[], object]] = {
        _REFERENCE: torch.optim.AdamW(parameters(), lr=1e-6, fused=True).step,
        "Sophia-G": sophia(),
    }
    if settings.foreach and device.type == "cpu":
        contenders["Sophia-G foreach"] = sophia(foreach=True)
    contenders["Tensor.copy_"] = copy
    return contenders


# Bytes that each must move per fp32 parameter: what it reads and what it writes, once.
_TRAFFIC = {_REFERENCE: 28, "Sophia-G": 24, "Sophia-G foreach": 24, "Tensor.copy_": 8}


def _timed(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _summary(seconds: dict[str, list[float]], name: str, parameters: int) -> dict[str, float]:
    times = seconds[name]
    # Round by round: what slows the machine for a while slows both sides of a ratio.
    ratios = [own / reference for own, reference in zip(times, seconds[_REFERENCE], strict=True)]
    median = statistics.median(times)
    return {
        "milliseconds": median * 1e3,
        "milliseconds_min": min(times) * 1e3,
        "milliseconds_max": max(times) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "gigabytes_per_second": _TRAFFIC[name] * parameters / median / 1e9,
    }


def _table(result: dict[str, Any]) -> Table:
    made = result["machine"]
    table = Table(
        title=f"One step on {result['tensors']} fp32 tensors, {result['parameters'] / 1e6:.1f} M parameters",
        caption=f"median of {result['settings']['rounds']} interleaved rounds (least to most); GB/s of "
        f"necessary traffic; "
        f"{made['gpu'] or made['cpu']}, {made['threads']} threads, torch {made['torch']}",
    )
    for heading in ("", "ms", f"times {_REFERENCE}", "GB/s"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for name, row in result["results"].items():
        table.add_row(
            name,
            f"{row['milliseconds']:.1f} ({row['milliseconds_min']:.1f} to {row['milliseconds_max']:.1f})",
            f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})",
            f"{row['gigabytes_per_second']:.1f}",
        )
    return table
