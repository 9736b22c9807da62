"""`sophia prepare`: from text to token shards; and `sophia prepare --verify`: are they still whole?"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from sophia.data.prepare import Prepared, Progress, prepare
from sophia.data.recipe import Recipe
from sophia.data.shards import Dataset
from sophia.data.sources import Sources, find_sources

_LINE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    """Settings of `sophia prepare`."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE …")] = ()
    """Files, folders, globs, hf:DATASET[@CONFIG][:SPLIT] or builtin. Text, JSON lines (.jsonl .ndjson .json) and
    parquet; text and JSON lines also as .gz .xz .zst. With --verify: data folders."""
    out: Path | None = None
    """Folder for the shards, manifest.json and tokenizer.json."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    """How text becomes tokens."""
    workers: int | None = None
    """Processes that encode; by default one for each core that this process may use. The result is the same."""
    overwrite: bool = False
    """Replace what an earlier `sophia prepare` left in the folder."""
    verify: bool = False
    """Prepare nothing: check every byte of finished data folders, as in `sophia prepare --verify DATA`."""
    json: bool = False
    """Print the result as one JSON object; everything else goes to stderr."""


def run(settings: Annotated[PrepareSettings, tyro.conf.arg(name="")]) -> None:
    """Turn text into token shards for training, or verify them.

    A file is one document, or cut into several if it is long; a record is one, of up to 256 KiB. An interrupted run
    goes on when the same command is given again.
    """
    console = Console(stderr=settings.json)
    if settings.verify:
        _verify(settings, console)
        return
    if settings.out is None:
        raise ValueError("no folder was named for the result; add --out DATA")
    sources = find_sources(settings.sources, without=settings.out)
    if sources.skipped:
        console.print(f"skipped in folders: {_skipped(sources)}", highlight=False, soft_wrap=True)
    workers = settings.workers if settings.workers is not None else usable_cores()
    with _shown(console) as report:
        prepared = prepare(
            sources,
            settings.out,
            settings.recipe,
            workers=workers,
            overwrite=settings.overwrite,
            report=report,
            status=lambda line: console.print(line, highlight=False),
        )
    result = summary(prepared, sources)
    if settings.json:
        print(json.dumps(result))
    else:
        console.print(_table(result))
        console.print(f"train on it:  sophia train --data {settings.out}", highlight=False, soft_wrap=True)


def summary(prepared: Prepared, sources: Sources) -> dict[str, Any]:
    """What --json prints."""
    dataset = prepared.dataset
    train, validation = dataset.train, dataset.validation
    tokens, text_bytes = train.tokens + validation.tokens, train.text_bytes + validation.text_bytes
    return {
        "data": str(dataset.folder),
        "fingerprint": dataset.fingerprint,
        "sources": len(sources.items),
        "documents": train.documents + validation.documents,
        "empty": prepared.empty,
        "text_bytes": text_bytes,
        "tokens": tokens,
        "bytes_per_token": text_bytes / tokens,
        "vocab_size": dataset.vocab_size,
        "splits": {
            name: {
                "tokens": split.tokens,
                "documents": split.documents,
                "text_bytes": split.text_bytes,
                "shards": len(split.shards),
            }
            for name, split in (("train", train), ("validation", validation))
        },
        "seconds": prepared.seconds,
        "continued": prepared.continued,
    }


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _verify(settings: PrepareSettings, console: Console) -> None:
    folders = [Path(name) for name in settings.sources] + ([settings.out] if settings.out else [])
    if not folders:
        raise ValueError("no folder was named; write sophia prepare --verify DATA")
    results = []
    for folder in folders:
        dataset = Dataset.open(folder)
        shards = len(dataset.train.shards) + len(dataset.validation.shards)
        with Bars(console=console, transient=True, disable=not console.is_terminal) as bars:
            bar = bars.add_task(f"verifying {folder}", total=dataset.train.tokens + dataset.validation.tokens)
            dataset.verify(lambda shard: bars.advance(bar, shard.tokens))  # noqa: B023 - called in this turn only
        results.append({"data": str(folder), "fingerprint": dataset.fingerprint, "shards": shards, "sound": True})
        console.print(f"{folder}: all {shards} shards are sound", highlight=False, soft_wrap=True)
    if settings.json:
        print(json.dumps(results))


@contextmanager
def _shown(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A bar with what is left on a terminal; a line now and then elsewhere."""
    if not console.is_terminal:
        last = time.monotonic()

        def print_line(progress: Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_SECONDS:
                last = time.monotonic()
                share = progress.bytes_read / max(progress.bytes_total, 1)
                console.print(f"{share:4.0%} read, {progress.tokens / 1e6:.1f} M tokens", highlight=False)

        yield print_line
        return
    columns = (
        TextColumn("preparing"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TextColumn("{task.fields[tokens]}"),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Bars(*columns, console=console, refresh_per_second=4, transient=True) as bars:

        def move(progress: Progress) -> None:
            tokens = f"{progress.tokens / 1e6:.1f} M tokens"
            if not bars.tasks:  # begun with the first batch, so that what an earlier run did is not taken for speed
                bars.add_task("", total=progress.bytes_total, completed=progress.bytes_read, tokens=tokens)
            bars.update(bars.tasks[0].id, completed=progress.bytes_read, tokens=tokens)

        yield move


def _skipped(sources: Sources) -> str:
    shown = ", ".join(f"{count} {suffix}" for suffix, count in sources.skipped[:5])
    more = sum(count for _, count in sources.skipped[5:])
    files = f"{shown}, {more} others" if more else shown
    return f"{files} (no known text; a glob such as 'FOLDER/**/*.py' names files of any kind)"


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=result["data"], title_justify="left")
    for heading in ("", "documents", "tokens", "text bytes", "shards"):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for name, split in result["splits"].items():
        table.add_row(name, *(f"{split[key]:,}" for key in ("documents", "tokens", "text_bytes", "shards")))
    caption = f"{result['bytes_per_token']:.2f} bytes a token, vocabulary {result['vocab_size']:,}, "
    caption += f"{result['seconds']:.1f} s"
    if result["empty"]:
        caption += f"; {result['empty']:,} files or records held no text"
    if result["continued"]:
        caption += "; continued"
    table.caption = caption
    return table
