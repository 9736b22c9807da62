"""`sophia bench step`: what one optimizer step costs beside torch's fused AdamW and the memory's limit, interleaved."""

import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from sophia import SophiaG, machine
from sophia.bench_result import publish
from sophia.optim import kernels
from sophia.timing import timed

_REFERENCE = "AdamW fused"
_FLOOR = "floor"

# Layers and width.
_SIZES = {"gpt2": (12, 768), "gpt2-medium": (24, 1024), "gpt2-large": (36, 1280), "gpt2-xl": (48, 1600)}

_FIRST_CALL = """
import time, torch, sophia
torch.set_num_threads({threads})
p = torch.nn.Parameter(torch.zeros(1 << 20, device={device!r}))
optimizer = sophia.SophiaG([p], fused=True)
p.grad = torch.ones_like(p)
optimizer.update_curvature([torch.ones_like(p)])
start = time.perf_counter()
optimizer.step()
float(p[0])
print(time.perf_counter() - start)
"""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of `sophia bench step`."""

    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    """The GPT-2 whose tensors are stepped: 124 M parameters in 148 tensors, 355 M, 774 M or 1.5 B."""
    layers: int | None = None
    """Transformer blocks, instead of the model's."""
    width: int | None = None
    """Size of the residual stream, instead of the model's."""
    vocab_size: int = 50257
    """Rows of the embedding."""
    rounds: int = 9
    """Rounds; in each every contender runs once, in turn. Medians are shown."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the tensors are."""
    foreach: bool = False
    """Also time Sophia's foreach path, which is slow on the CPU."""
    out: Path | None = None
    """Write the result to this JSON file."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    def __post_init__(self) -> None:
        """Refuse what cannot be timed."""
        for name in ("layers", "width", "vocab_size", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: it must be at least 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no CUDA device here: use --device cpu")


class Contender(NamedTuple):
    """What is timed."""

    run: Callable[[], object]
    bytes: int
    """That it must move per parameter: what it reads and what it writes, once."""


def step(settings: Annotated[StepSettings, tyro.conf.arg(name="")]) -> None:
    """Time one optimizer step of Sophia-G against torch's fused AdamW and against its memory traffic alone."""
    console = Console(stderr=settings.json)
    publish(measure(settings, console), _table, console, out=settings.out, as_json=settings.json)


def measure(settings: StepSettings, console: Console) -> dict[str, Any]:
    """Run the rounds: {"settings", "machine", "parameters", "results": {name: {"milliseconds", "ratio", …}}}."""
    layers, width = _SIZES[settings.model]
    shapes = gpt2_shapes(
        layers=settings.layers or layers, width=settings.width or width, vocab_size=settings.vocab_size
    )
    contenders = _contenders(shapes, settings)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in track(range(settings.rounds + 1), description="timing steps", console=console, transient=True):
        for name, contender in contenders.items():
            seconds[name].append(timed(contender.run, torch.device(settings.device)))
    for times in seconds.values():
        del times[0]  # the first round compiles kernels, touches new memory and fills caches
    parameters = sum(torch.Size(shape).numel() for shape in shapes)
    floors = [name for name in contenders if name.startswith(_FLOOR)]
    floor = min(floors, key=lambda name: statistics.median(seconds[name]))
    return {
        "bench": "step",
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
        "machine": machine.describe(),
        "tensors": len(shapes),
        "parameters": parameters,
        "floor": floor,
        "first_call_seconds": _first_call_seconds(settings.device),
        "results": {
            name: _summary(seconds, name, floor, contender.bytes, parameters) for name, contender in contenders.items()
        },
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


def _contenders(shapes: Sequence[tuple[int, ...]], settings: StepSettings) -> dict[str, Contender]:
    device = torch.device(settings.device)
    generator = torch.Generator(device).manual_seed(0)

    def draw(scale: float) -> list[Tensor]:
        return [torch.randn(shape, generator=generator, device=device).mul_(scale) for shape in shapes]

    gradients = draw(1e-3)

    def parameters() -> list[nn.Parameter]:
        tensors = [nn.Parameter(t) for t in draw(0.02)]
        for p, gradient in zip(tensors, gradients, strict=True):
            p.grad = gradient
        return tensors

    def sophia(**settings: Any) -> Callable[[], object]:
        optimizer = SophiaG(parameters(), lr=1e-6, **settings)
        # Random curvature of the size at which about half of the coordinates are clipped.
        optimizer.update_curvature([t.square_() for t in draw(1.0)])
        return optimizer.step

    def copy() -> None:
        for a, b in zip(source, target, strict=True):
            b.copy_(a)

    contenders = {_REFERENCE: Contender(torch.optim.AdamW(parameters(), lr=1e-6, fused=True).step, 28)}
    if kernels.problem(device.type) is None:
        contenders["Sophia-G fused"] = Contender(sophia(fused=True), 24)
        contenders["Sophia-G fused, bf16 state"] = Contender(sophia(fused=True, state_dtype=torch.bfloat16), 18)
    if device.type == "cpu":
        contenders["Sophia-G plain"] = Contender(sophia(foreach=False), 24)
    if settings.foreach or device.type != "cpu":
        contenders["Sophia-G foreach"] = Contender(sophia(foreach=True), 24)
    contenders |= _floors(gradients, draw)
    source, target = gradients, draw(1.0)
    contenders["Tensor.copy_"] = Contender(copy, 8)
    return contenders


def _floors(gradients: list[Tensor], draw: Callable[[float], list[Tensor]]) -> dict[str, Contender]:
    """The traffic of Sophia's step, p, g, m and h read, p and m written, with next to no arithmetic."""
    p, m, h = draw(1.0), draw(1.0), draw(1.0)

    def additions() -> None:
        torch._foreach_add_(p, h)
        torch._foreach_add_(m, gradients)

    floors: dict[str, Callable[[], object]] = {"torch's additions": additions}
    device_type = p[0].device.type
    if kernels.problem(device_type) is None:
        floor_ = kernels.module(device_type).floor_
        if device_type == "cpu":
            threads = torch.get_num_threads()
            share = -(-sum(t.numel() for t in p) // threads)
            floors["a part for each thread"] = lambda: floor_(p, gradients, m, h, piece=share)
            floors["pieces of 1 M"] = lambda: floor_(p, gradients, m, h, piece=1 << 20)
            floors["pieces of 1 M, prefetched"] = lambda: floor_(p, gradients, m, h, piece=1 << 20, prefetched=True)
        else:
            kept: dict[str, Any] = {}
            floors["kernel"] = lambda: floor_(p, gradients, m, h, kept=kept)
    return {f"{_FLOOR}: {name}": Contender(run, 24) for name, run in floors.items()}


def _first_call_seconds(device: str) -> float | None:
    """What the first fused step takes in a new process, with all that is imported and compiled for it."""
    if kernels.problem(device) is not None:
        return None
    code = _FIRST_CALL.format(threads=torch.get_num_threads(), device=device)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _summary(
    seconds: dict[str, list[float]], name: str, floor: str, bytes_moved: int, parameters: int
) -> dict[str, float]:
    times = seconds[name]
    median = statistics.median(times)
    summary = {
        "milliseconds": median * 1e3,
        "milliseconds_min": min(times) * 1e3,
        "milliseconds_max": max(times) * 1e3,
        "bytes_per_parameter": bytes_moved,
        "gigabytes_per_second": bytes_moved * parameters / median / 1e9,
    }
    for ratio, other in (("ratio", _REFERENCE), ("ratio_to_floor", floor)):
        # Round by round: what slows the machine for a while slows both sides of a ratio.
        ratios = [own / reference for own, reference in zip(times, seconds[other], strict=True)]
        summary |= {ratio: statistics.median(ratios), f"{ratio}_min": min(ratios), f"{ratio}_max": max(ratios)}
    return summary


def _table(result: dict[str, Any]) -> Table:
    made = result["machine"]
    first = result["first_call_seconds"]
    table = Table(
        title=f"One step on {result['tensors']} fp32 tensors, {result['parameters'] / 1e6:.1f} M parameters",
        caption=f"median of {result['settings']['rounds']} interleaved rounds (least to most); GB/s of necessary "
        "traffic, which a floor moves with next to no arithmetic; "
        + ("" if first is None else f"first fused step of a process {first:.1f} s; ")
        + f"{made['gpu'] or made['cpu']}, {made['threads']} threads, torch {made['torch']}",
    )
    for heading in ("", "ms", f"times {_REFERENCE}", "times the fastest floor", "GB/s"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for name, row in result["results"].items():
        table.add_row(
            name,
            *(
                f"{row[figure]:.{digits}f} ({row[f'{figure}_min']:.{digits}f} to {row[f'{figure}_max']:.{digits}f})"
                for figure, digits in (("milliseconds", 1), ("ratio", 2), ("ratio_to_floor", 2))
            ),
            f"{row['gigabytes_per_second']:.1f}",
        )
    return table
