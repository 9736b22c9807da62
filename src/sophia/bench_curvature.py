"""`sophia bench curvature`: what estimates of the curvature cost beside training, and how far they are off.

Cost is measured on a real model, error on one so small that its exact curvature can be computed.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from sophia import bench_curvature_cost, bench_curvature_error, machine
from sophia.bench_curvature_cost import Setup
from sophia.bench_result import publish
from sophia.distributed import pick_device
from sophia.model import padded_vocabulary
from sophia.presets import CURVATURE_INTERVAL, default_curvature, preset

_CPU_CONTEXT = 256
_CUDA_MICRO_BATCH = 16
Part = Literal["cost", "sampling", "error"]


@dataclass(frozen=True, kw_only=True)
class CurvatureBenchSettings:
    """Settings of `sophia bench curvature`."""

    model: str = "gpt2-small"
    """Preset whose training step is the measure of cost."""
    vocab_size: int = 50257
    """Token ids; padded as the trainer does."""
    context: int | None = None
    """Tokens in a sequence; None is the preset's, on the CPU at most 256."""
    rows: int | None = None
    """Sequences in a training step; None is the preset's."""
    micro_batch: int | None = None
    """Sequences in one forward pass; None is 1 on the CPU and 16 elsewhere."""
    device: Literal["auto", "cuda", "cpu"] = "cpu"
    """Where cost is measured; errors are computed on the CPU, in float64."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of forward passes; auto is fp32 on the CPU and bf16 elsewhere."""
    compile: bool = False
    """Train and estimate through torch.compile."""
    rounds: int = 5
    """Rounds in which all take turns, after one to warm up. The median is shown."""
    sampling_vocabularies: tuple[int, ...] = (4096, 50304)
    """Vocabularies for which the noise alone is timed."""
    error_rows: int = 64
    """Sequences of the batch whose exact curvature is computed; a multiple of 16."""
    draws: int = 40
    """Estimates of each kind against it."""
    parts: tuple[Part, ...] = ("cost", "sampling", "error")
    """What to measure."""
    out: Path | None = None
    """Write the result to this JSON file."""
    json: bool = False
    """Print the result as JSON instead of tables."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for name, least in (("vocab_size", 2), ("context", 1), ("rows", 1), ("micro_batch", 1), ("rounds", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}: it must be at least {least}")
        if self.error_rows < 16 or self.error_rows % 16:
            raise ValueError(f"error_rows is {self.error_rows}: it must be a multiple of 16, of which a sixteenth is")
        if self.draws < 20:
            raise ValueError(f"draws is {self.draws}: fewer than 20 would show chance")
        if not self.parts:
            raise ValueError("parts is empty: name cost, sampling or error")


def curvature(settings: Annotated[CurvatureBenchSettings, tyro.conf.arg(name="")]) -> None:
    """Measure the cost of curvature estimates beside training, and their error against the exact curvature."""
    console = Console(stderr=settings.json)
    publish(measure(settings, console), _tables, console, out=settings.out, as_json=settings.json)


def measure(settings: CurvatureBenchSettings, console: Console) -> dict[str, Any]:
    """{"settings", "machine", "setup", "cost", "sampling", "error"}: of each part what its module returns."""
    setup = _setup(settings)
    result: dict[str, Any] = {
        "bench": "curvature",
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
        "machine": machine.describe(),
        "setup": {
            name: getattr(setup, name)
            for name in ("total_rows", "micro_batch", "curvature_rows", "curvature_chunks", "chunk_rows", "precision")
        }
        | {"context": setup.config.context, "vocab_size": setup.config.head_rows, "device": setup.device.type},
    }
    with console.status("starting") as status:
        tick: Callable[[str], None] = status.update
        if "cost" in settings.parts:
            result["cost"] = bench_curvature_cost.measure(setup, settings.rounds, tick)
        if "sampling" in settings.parts:
            result["sampling"] = [
                bench_curvature_cost.measure_sampling(
                    dataclasses.replace(
                        setup, config=dataclasses.replace(setup.config, vocab_size=vocab, padded_vocab_size=None)
                    ),
                    settings.rounds,
                    tick,
                )
                for vocab in settings.sampling_vocabularies
            ]
        if "error" in settings.parts:
            result["error"] = bench_curvature_error.measure(settings.error_rows, settings.draws, tick)
    return result


def _setup(settings: CurvatureBenchSettings) -> Setup:
    device = pick_device(settings.device)
    slow, base = device.type == "cpu", preset(settings.model)
    context = settings.context or (min(base.context, _CPU_CONTEXT) if slow else base.context)
    # As many sequences as the preset's step has, whatever their length: what counts is the ratio to an estimate's.
    total = settings.rows or base.tokens_per_step // base.context
    rows, chunks = default_curvature(total)
    precision = settings.precision if settings.precision != "auto" else "fp32" if slow else "bf16"
    return Setup(
        config=base.config(
            settings.vocab_size, context=context, padded_vocab_size=padded_vocabulary(settings.vocab_size, 64)
        ),
        recipe=dict(base.recipes["sophia-g"]),
        total_rows=total,
        micro_batch=min(total, settings.micro_batch or (1 if slow else _CUDA_MICRO_BATCH)),
        curvature_rows=rows,
        curvature_chunks=chunks,
        device=device,
        precision=precision,
        compile=settings.compile,
    )


def _tables(result: dict[str, Any]) -> Table:
    whole = Table.grid(padding=(1, 0))
    if "cost" in result:
        whole.add_row(_cost_table(result))
    if "sampling" in result:
        whole.add_row(_sampling_table(result))
    if "error" in result:
        whole.add_row(_error_table(result))
    return whole


def _cost_table(result: dict[str, Any]) -> Table:
    setup, made = result["setup"], result["machine"]
    place = made["gpu"] if setup["device"] == "cuda" else f"{made['cpu']}, {made['threads']} threads"
    table = Table(
        title=f"Cost of a curvature estimate every {CURVATURE_INTERVAL} steps: {result['settings']['model']}, "
        f"{setup['total_rows']} sequences of {setup['context']} tokens a step, {setup['precision']}",
        caption=f"medians of {result['settings']['rounds']} interleaved rounds (least to most). Timed: the sequences "
        "in the last column; multiplied: up to those of the estimate and of the step. "
        f"{place}, torch {made['torch']}",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("estimate", "% of training", "timed"):
        table.add_column(heading, justify="left" if heading == "estimate" else "right")
    seconds = result["cost"]["seconds"]
    for line in result["cost"]["refreshes"]:
        timed = seconds[line["timed"]]
        share = bench_curvature_cost.summary(timed["rounds"])["median"]
        table.add_row(line["name"], _spread(line["percent"]), f"{timed['rows']} in {1e3 * share:.1f} ms")
    for name, what in (("a training micro-batch", "training"), ("clip and step", "step"), ("check and fold", "fold")):
        times = bench_curvature_cost.summary(seconds[what]["rounds"])
        table.add_row(name, "", f"{seconds[what]['rows']} in {1e3 * times['median']:.1f} ms")
    return table


def _sampling_table(result: dict[str, Any]) -> Table:
    table = Table(
        title="Noise for every prediction of a batch, in percent of the training step from that batch",
        caption="Labels and signs with the softmax that they need; an estimate from a part of the batch in every tenth "
        "step costs that part of a tenth.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for one in result["sampling"]:
        table.add_column(f"vocabulary of {one['vocab_size']}", justify="right")
    for name in result["sampling"][0]["results"]:
        table.add_row(name, *(_spread(one["results"][name]["percent"]) for one in result["sampling"]))
    return table


def _error_table(result: dict[str, Any]) -> Table:
    settings = result["settings"]
    table = Table(
        title="Error of one estimate against the exact Gauss-Newton diagonal of the whole batch",
        caption=f"ΣΔ²/Σexact², mean of {settings['draws']} draws ± standard deviation (least to most), for a batch of "
        f"{settings['error_rows']} sequences of {bench_curvature_error.SHAPE.context} tokens; last: the median over "
        "coordinates of |Δ|/exact.",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("sequences", "chunks", "noise", "ΣΔ²/Σexact²", "median coordinate"):
        table.add_column(heading, justify="left" if heading == "noise" else "right")
    for row in result["error"]:
        table.add_row(
            f"{row['rows']} of {settings['error_rows']}",
            str(row["chunks"]),
            row["noise"],
            f"{row['error']:.2f} ± {row['error_std']:.2f} ({row['error_min']:.2f} to {row['error_max']:.2f})",
            f"{row['median_coordinate']:.2f}",
        )
    return table


def _spread(numbers: dict[str, float]) -> str:
    return f"{numbers['median']:.2f} ({numbers['min']:.2f} to {numbers['max']:.2f})"
