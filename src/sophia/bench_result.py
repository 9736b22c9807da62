"""Where the result of a bench goes: a JSON file, the terminal as a table, or standard output for a machine."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sophia import machine


def publish(
    result: dict[str, Any],
    table: Callable[[dict[str, Any]], Table],
    console: Console,
    *,
    out: Path | None,
    as_json: bool,
) -> None:
    """Write a result to a file, if one is named, and print it: as a table, or as JSON."""
    if out is not None:
        machine.write_json(out, result)
    if as_json:
        print(json.dumps(result))
        return
    console.print(table(result))
    if out is not None:
        console.print(f"written to {out}", highlight=False, soft_wrap=True)
