"""`sophia bench prepare`: text to shards on disk, beside the tokenizer library's own batch encoding in memory."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import tokenizers
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sophia import machine
from sophia.bench_result import publish
from sophia.data.documents import Reading
from sophia.data.prepare import prepare
from sophia.data.recipe import Recipe
from sophia.data.sources import find_sources
from sophia.prepare import usable_cores

_REFERENCE = "encode_batch"
# Documents handed to the library at once; with more it gets no faster, and needs a hundred times their memory.
_BATCH_DOCUMENTS = 1024


@dataclass(frozen=True, kw_only=True)
class PrepareBenchSettings:
    """Settings of `sophia bench prepare`."""

    source: str = "builtin"
    """Text to measure on, as `sophia prepare` takes it."""
    megabytes: float = 16
    """How much of it."""
    tokenizer: str = "bpe:16000"
    """As `sophia prepare` takes it."""
    document_separator: str = ""
    """As `sophia prepare` takes it."""
    rounds: int = 5
    """Rounds; in each every contender takes its turn. The median is shown."""
    workers: int | None = None
    """Processes of `sophia prepare`; by default one for each core."""
    out: Path | None = None
    """Write the result to this JSON file."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    def __post_init__(self) -> None:
        """Refuse what cannot be timed."""
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}: it must be at least 1")
        if not self.megabytes > 0:
            raise ValueError(f"megabytes is {self.megabytes}: it must be more than 0")


def run(settings: Annotated[PrepareBenchSettings, tyro.conf.arg(name="")]) -> None:
    """Time `sophia prepare` against the tokenizer library's encode_batch on the same text and cores."""
    console = Console(stderr=settings.json)
    publish(measure(settings, console), _table, console, out=settings.out, as_json=settings.json)


def measure(settings: PrepareBenchSettings, console: Console) -> dict[str, Any]:
    """Run the rounds: {"settings", "machine", "text_bytes", "tokens", "results": {name: {"seconds", "ratio", …}}}."""
    with tempfile.TemporaryDirectory(prefix="sophia-bench-") as name:
        folder = Path(name)
        texts = _texts(settings)
        # JSON lines keep the documents' boundaries, so both sides get the same documents.
        source = folder / "text.jsonl"
        with source.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        # Half for validation: even a few documents then fall on both sides.
        recipe = Recipe(tokenizer=settings.tokenizer, validation_fraction=0.5)
        workers = settings.workers or usable_cores()
        with console.status("first pass, with the tokenizer's training"):
            dataset = prepare(
                find_sources([str(source)], without=folder), folder / "0", recipe, workers=workers
            ).dataset
        recipe = replace(recipe, tokenizer=str(folder / "0" / "tokenizer.json"))
        tokenizer = dataset.tokenizer()
        contenders = _contenders(tokenizer, texts)
        contenders["sophia prepare"] = lambda: prepare(
            find_sources([str(source)], without=folder), folder / "data", recipe, workers=workers, overwrite=True
        )
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        work: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in track(range(settings.rounds), description="timing", console=console, transient=True):
            for contender, act in contenders.items():
                start, spent = time.perf_counter(), _processor_seconds()
                act()
                seconds[contender].append(time.perf_counter() - start)
                work[contender].append(_processor_seconds() - spent)
    size = sum(len(text.encode()) for text in texts)
    return {
        "bench": "prepare",
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
        "machine": {**machine.describe(), "tokenizers": tokenizers.__version__},
        "workers": workers,
        "text_bytes": size,
        "documents": len(texts),
        "tokens": dataset.train.tokens + dataset.validation.tokens,
        "results": {name: _summary(seconds, work, name, size) for name in contenders},
    }


def _texts(settings: PrepareBenchSettings) -> list[str]:
    reading = Reading(document_separator=settings.document_separator)
    texts: list[str] = []
    left = settings.megabytes * 10**6
    for item in find_sources([settings.source], without=Path(os.devnull)).items:
        for piece in item.documents(reading):
            left -= len(piece.text)
            texts.append(piece.text.decode())
            if left <= 0:
                return texts
    return texts


def _contenders(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> dict[str, Callable[[], object]]:
    def encode(batch: Callable[..., object]) -> Callable[[], object]:
        def all_batches() -> None:
            remaining = iter(texts)
            while some := list(islice(remaining, _BATCH_DOCUMENTS)):
                batch(some, add_special_tokens=False)

        return all_batches

    return {_REFERENCE: encode(tokenizer.encode_batch), "encode_batch_fast": encode(tokenizer.encode_batch_fast)}


def _processor_seconds() -> float:
    """Spent by this process and its children that have ended, on all cores: what others do does not count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _summary(seconds: dict[str, list[float]], work: dict[str, list[float]], name: str, size: int) -> dict[str, float]:
    times = seconds[name]
    # Round by round: what slows the machine for a while slows both sides of a ratio.
    ratios = [reference / own for own, reference in zip(times, seconds[_REFERENCE], strict=True)]
    return {
        "seconds": statistics.median(times),
        "megabytes_per_second": size / statistics.median(times) / 1e6,
        "processor_seconds": statistics.median(work[name]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def _table(result: dict[str, Any]) -> Table:
    made = result["machine"]
    table = Table(
        title=f"{result['text_bytes'] / 1e6:.1f} MB of text, {result['documents']:,} documents, "
        f"{result['tokens'] / 1e6:.1f} M tokens",
        caption=f"median of {result['settings']['rounds']} interleaved rounds (least to most); {made['cpu']}, "
        f"{result['workers']} workers, tokenizers {made['tokenizers']}",
    )
    for heading in ("", "MB/s", "CPU s/MB", f"rate over {_REFERENCE}"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for name, row in result["results"].items():
        rate = f"{row['megabytes_per_second']:.2f}"
        work = f"{row['processor_seconds'] / result['text_bytes'] * 1e6:.2f}"
        table.add_row(name, rate, work, f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})")
    return table
