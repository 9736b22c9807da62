"""`sophia bench loader`: what reading batches costs beside the training step that uses them, in one interleaved run.

The loader is made to look bad: a small vocabulary and torch's fused AdamW make the step cheap, and a round measures a
single forward and backward pass, where a real step accumulates many but reads its batch at once.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer, models
from torch import Tensor

from sophia import machine
from sophia.bench_result import publish
from sophia.data.loader import Batches, Prefetcher
from sophia.data.shards import Dataset, write_dataset
from sophia.model import GPT
from sophia.presets import preset
from sophia.timing import timed

_DOCUMENT = 1 << 16
_STEP = "step alone"
_READ = "reading alone"
_AFTER = "reading, then step"
_AHEAD = "step, reading ahead"
_WAIT = "of which waiting"


@dataclass(frozen=True, kw_only=True)
class LoaderBenchSettings:
    """Settings of `sophia bench loader`."""

    models: tuple[str, ...] = ("nano", "micro", "gpt2-small")
    """Presets whose step is the yardstick."""
    tokens_per_step: int = 2048
    """Predictions in a timed step; rounded to whole sequences of the preset, at least one."""
    vocab_size: int = 1024
    """Token ids."""
    data: Path | None = None
    """Data folder to read; None writes random tokens into a temporary one."""
    data_tokens: int = 32_000_000
    """How many random tokens."""
    rounds: int = 15
    """Rounds, in each of which everything is done once, in turn. Medians are shown."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the model is trained."""
    out: Path | None = None
    """Write the result to this JSON file."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    def __post_init__(self) -> None:
        """Refuse what cannot be timed."""
        for name in ("tokens_per_step", "data_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size is {self.vocab_size}: it must be at least 2")
        for name in self.models:
            preset(name)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no CUDA device here: use --device cpu")


def loader(settings: Annotated[LoaderBenchSettings, tyro.conf.arg(name="")]) -> None:
    """Time reading batches against the training steps that consume them."""
    console = Console(stderr=settings.json)
    publish(measure(settings, console), _table, console, out=settings.out, as_json=settings.json)


def measure(settings: LoaderBenchSettings, console: Console) -> dict[str, Any]:
    """Run the rounds: {"settings", "machine", "results": {model: {"rows", "context", "times": {label: {…}}}}}."""
    with tempfile.TemporaryDirectory() as folder:
        if settings.data is not None:
            dataset = Dataset.open(settings.data)
        else:
            with console.status("writing random tokens"):
                dataset = _random_dataset(Path(folder) / "data", settings)
        results = {name: _measure_model(name, dataset, settings, console) for name in settings.models}
        return {
            "bench": "loader",
            "settings": {
                name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()
            },
            "machine": machine.describe(),
            "tokens": dataset.train.tokens,
            "results": results,
        }


def _random_dataset(folder: Path, settings: LoaderBenchSettings) -> Dataset:
    vocabulary = {f"w{n}": n for n in range(settings.vocab_size)}
    generator = np.random.default_rng(0)
    lengths = [_DOCUMENT] * (settings.data_tokens // _DOCUMENT) + [max(settings.data_tokens % _DOCUMENT, 1)]
    documents = (generator.integers(settings.vocab_size, size=length) for length in lengths)
    return write_dataset(
        folder, Tokenizer(models.WordLevel(vocabulary)), train=documents, validation=[], end_of_text=None
    )


def _measure_model(name: str, dataset: Dataset, settings: LoaderBenchSettings, console: Console) -> dict[str, Any]:
    context = preset(name).context
    rows = max(1, round(settings.tokens_per_step / context))
    device = torch.device(settings.device)
    batches = Batches(dataset, context=context, rows=rows, seed=0)
    step = _training_step(name, dataset.vocab_size, device)
    same = tuple(part.to(device) for part in batches.step(0))
    indices = iter(range(10**9))
    seconds: dict[str, list[float]] = {label: [] for label in (_STEP, _READ, _AFTER, _AHEAD, _WAIT)}

    def read() -> tuple[Tensor, Tensor]:
        inputs, targets = batches.step(next(indices))
        return inputs.to(device), targets.to(device)

    with Prefetcher(batches, start=1_000_000, rows=range(rows), device=device) as prefetcher:
        waits: list[float] = []

        def wait() -> tuple[Tensor, Tensor]:
            began = time.perf_counter()
            pair = next(prefetcher)
            waits.append(time.perf_counter() - began)
            return pair

        calls: dict[str, Callable[[], object]] = {
            _STEP: lambda: step(*same),
            _READ: read,
            _AFTER: lambda: step(*read()),
            _AHEAD: lambda: step(*wait()),
        }
        for _ in track(range(settings.rounds + 1), description=f"timing {name}", console=console, transient=True):
            for label, run in calls.items():
                seconds[label].append(timed(run, device))
        seconds[_WAIT] = waits
    for times in seconds.values():
        del times[0]  # the first round touches new memory and fills caches
    return {
        "rows": rows,
        "context": context,
        "times": {label: _summary(times, seconds[_STEP]) for label, times in seconds.items()},
    }


def _training_step(name: str, vocab_size: int, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    model = GPT(preset(name).config(vocab_size), torch.Generator().manual_seed(0)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(inputs: Tensor, targets: Tensor) -> None:
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _summary(times: list[float], steps: list[float]) -> dict[str, float]:
    # Round by round: what slows the machine for a while slows both sides of a ratio.
    ratios = [own / step for own, step in zip(times, steps, strict=True)]
    return {
        "milliseconds": statistics.median(times) * 1e3,
        "milliseconds_min": min(times) * 1e3,
        "milliseconds_max": max(times) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def _table(result: dict[str, Any]) -> Table:
    made = result["machine"]
    table = Table(
        title=f"Reading batches of {result['tokens'] / 1e6:.0f} M tokens beside training on them",
        caption=f"medians of {result['settings']['rounds']} interleaved rounds (and least to most); "
        f"{made['gpu'] or made['cpu']}, {made['threads']} threads, torch {made['torch']}",
    )
    for heading in ("", "", "ms", "of the step alone"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, model in result["results"].items():
        for label, row in model["times"].items():
            table.add_row(
                f"{name}\n{model['rows']} x {model['context']}" if label == _STEP else "",
                label,
                f"{row['milliseconds']:,.2f}",
                f"{row['ratio']:.2%} ({row['ratio_min']:.2%} to {row['ratio_max']:.2%})",
            )
        table.add_section()
    return table
