"""A plan as a person reads it."""

from typing import Any

from rich.console import Console
from rich.table import Table

_GIB = 2**30
_PARTS = {
    "parameters": "parameters, fp32",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits and loss",
    "other": "copies, temporaries",
    "holes": "holes in the heap",
}


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Print what `make_plan` found: memory, the verdict, remedies, speed."""
    console.print(_title(plan), highlight=False)
    console.print(_memory(plan))
    console.print(_moment(plan), highlight=False)
    console.print(_verdict(plan), highlight=False)
    if plan["changes"]:
        console.print(_changes(plan))
    console.print(_speed(plan))
    console.print(_basis(plan), highlight=False)


def _title(plan: dict[str, Any]) -> str:
    setup, settings = plan["setup"], plan["settings"]
    words = [
        f"[bold]{settings['model']}[/]: {plan['parameters']['total'] / 1e6:.1f} M parameters",
        settings["optimizer"],
        setup["precision"],
        *(["activation checkpointing"] if setup["model"]["activation_checkpointing"] else []),
        *([setup["parallel"]] if setup["gpus"] > 1 else []),
    ]
    place = "the CPU" if settings["device"] == "cpu" else f"{setup['gpus']} × {setup['device']}"
    return f"{', '.join(words)}, on {place}"


def _moment(plan: dict[str, Any]) -> str:
    setup = plan["setup"]
    passes = setup["micro_batches_per_step"]
    return (
        f"The peak ({plan['memory']['moment']}), with micro-batches of {setup['micro_batch']} × "
        f"{setup['model']['context']} tokens, {'one' if passes == 1 else passes} in a step."
    )


def _memory(plan: dict[str, Any]) -> Table:
    gpus, memory = plan["setup"]["gpus"], plan["memory"]
    table = Table()
    table.add_column("memory")
    table.add_column("GiB each" if gpus > 1 else "GiB", justify="right")
    if gpus > 1:
        table.add_column("GiB in total", justify="right")
    for name, label in _PARTS.items():
        if name != "holes" or memory["per_gpu"][name]:
            table.add_row(label, *_gib(memory["per_gpu"][name], gpus))
    table.add_section()
    table.add_row("needed", *_gib(memory["per_gpu"]["total"], gpus), style="bold")
    table.add_row("usable", *_gib(memory["usable_per_gpu"], gpus))
    return table


def _gib(size: float, gpus: int) -> list[str]:
    return [f"{size * times / _GIB:.2f}" for times in ((1, gpus) if gpus > 1 else (1,))]


def _largest(setup: dict[str, Any]) -> str:
    if setup["micro_batches_per_step"] == 1:
        return f"All {setup['micro_batch']} sequences of a device go through at once."
    return f"{setup['micro_batch']} is the largest that does."


def _verdict(plan: dict[str, Any]) -> str:
    needed, usable = plan["memory"]["per_gpu"]["total"], plan["memory"]["usable_per_gpu"]
    if plan["fits"]:
        chosen = "" if plan["settings"]["micro_batch"] else f" {_largest(plan['setup'])}"
        return f"[green]It fits[/], in {needed / usable:.0%} of the usable memory.{chosen}"
    return f"[red]It does not fit[/]: {needed / _GIB:.2f} GiB are needed, {usable / _GIB:.2f} usable."


def _changes(plan: dict[str, Any]) -> Table:
    table = Table()
    table.add_column("what to change, each alone")
    table.add_column("GiB each", justify="right")
    table.add_column("fits")
    for change in plan["changes"]:
        table.add_row(
            change["what"], f"{change['total'] / _GIB:.2f}", "[green]yes[/]" if change["fits"] else "[red]no[/]"
        )
    return table


def _speed(plan: dict[str, Any]) -> Table:
    speed = plan["speed"]
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("tokens a second", f"{speed['tokens_per_second']:,.0f}")
    table.add_row("seconds a step", f"{speed['seconds_per_step']:.3g}")
    table.add_row("tokens", f"{_short(speed['tokens'])} in {speed['steps']:,} steps")
    table.add_row("time", _duration(speed["days"]))
    if plan["setup"]["gpus"] > 1:
        table.add_row("GPU hours", f"{speed['gpu_hours']:,.1f}")
    if speed["cost"] is not None:
        table.add_row("cost", f"{speed['cost']:,.2f}")
    return table


def _basis(plan: dict[str, Any]) -> str:
    speed = plan["speed"]
    alone = "" if plan["setup"]["gpus"] == 1 else " Communication between GPUs is not counted."
    return (
        f"At {speed['utilisation']:.0%} of {speed['peak_flops_per_gpu'] / 1e12:.3g} TFLOP/s "
        f"({speed['peak_source']}).{alone}"
    )


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.0f}"


def _duration(days: float) -> str:
    for size, unit in ((1, "days"), (1 / 24, "hours"), (1 / 1440, "minutes")):
        if days >= size:
            return f"{days / size:.1f} {unit}"
    return f"{days * 86400:.1f} seconds"
