"""`sophia bench update`: what each optimizer's own work costs beside a training step: operations, and time in turns.

Blocks of a model are alike, so some of them are run and the rest is multiplication. Gradients and curvature are drawn:
no product of an optimizer depends on their values. An interval between two refreshes is run whole, with the refresh or
the new bases in it, after a first one, whose eigenvectors are computed from nothing.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from sophia import machine
from sophia.accounting import count_parameters, curvature_share, flops_per_token
from sophia.bench_result import publish
from sophia.config import OPTIMIZERS, OptimizerSettings
from sophia.meaning import MATRIX_SETTINGS
from sophia.model import GPT, GPTConfig
from sophia.optim import Sophia, SophiaK
from sophia.optimizers import Optimizers
from sophia.presets import CURVATURE_INTERVAL, default_curvature, preset
from sophia.study.flops import count
from sophia.timing import timed

_REFERENCE = "adamw"
# The embedding's and the vectors' updates have no products; their size tells in the seconds only.
_VOCABULARY = 50304


@dataclass(frozen=True, kw_only=True)
class UpdateSettings:
    """Settings of `sophia bench update`."""

    model: str = "gpt2-small"
    """Preset whose matrices are updated."""
    tokens_per_step: int = 480 * 1024
    """Predictions in a training step, against which the cost is held."""
    optimizers: tuple[str, ...] = (_REFERENCE, "sophia-g", "muon", "soap", "sophia-k")
    """Which; adamw is the yardstick of the time, and is always there."""
    blocks: int = 1
    """Transformer blocks that are really run; the cost of the others is theirs."""
    rounds: int = 3
    """Rounds of ten updates; in each every optimizer runs once, in turn. Medians are shown."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    out: Path | None = None
    """Write the result to this JSON file."""
    json: bool = False
    """Print the result as JSON instead of a table."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        layers = preset(self.model).layers
        for name, most in (("tokens_per_step", None), ("rounds", None), ("blocks", layers)):
            value = getattr(self, name)
            if value < 1 or (most is not None and value > most):
                upper = "" if most is None else f" and at most the model's {most}"
                raise ValueError(f"{name} is {value}: it must be at least 1{upper}")
        for one in self.optimizers:
            if one not in OPTIMIZERS or one == "sophia-h":
                known = ", ".join(name for name in OPTIMIZERS if name != "sophia-h")
                raise ValueError(f"optimizers holds {one!r}: choose from {known}")
        if self.tokens_per_step % preset(self.model).context:
            raise ValueError(
                f"tokens_per_step is {self.tokens_per_step}, no multiple of the {preset(self.model).context} tokens of "
                f"a sequence of {self.model}"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch finds no CUDA device here: use --device cpu")


def update(settings: Annotated[UpdateSettings, tyro.conf.arg(name="")]) -> None:
    """Count and time the updates of optimizers beside a training step of a model."""
    console = Console(stderr=settings.json)
    publish(measure(settings, console), _table, console, out=settings.out, as_json=settings.json)


def measure(settings: UpdateSettings, console: Console) -> dict[str, Any]:
    """Count and time: {"settings", "machine", "training_flops", "results": {optimizer: {"percent", …}}}."""
    whole = preset(settings.model).config(_VOCABULARY)
    names = list(dict.fromkeys((_REFERENCE, *settings.optimizers)))
    intervals = {name: _interval(name, whole, settings) for name in names}
    for run in intervals.values():
        run()
    flops = {name: count(run) / CURVATURE_INTERVAL for name, run in intervals.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in track(range(settings.rounds), description="timing updates", console=console, transient=True):
        for name, run in intervals.items():
            seconds[name].append(timed(run, torch.device(settings.device)) / CURVATURE_INTERVAL)
    training = flops_per_token(whole) * settings.tokens_per_step
    rows = settings.tokens_per_step // whole.context
    blocks = whole.layers / settings.blocks
    return {
        "bench": "update",
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
        "machine": machine.describe(),
        "parameters": count_parameters(whole).total,
        "training_flops": training,
        "results": {
            name: {
                "flops": flops[name] * blocks,
                "update_percent": 100 * flops[name] * blocks / training,
                "curvature_percent": 100 * _passes(name, rows),
                "percent": 100 * (flops[name] * blocks / training + _passes(name, rows)),
                "milliseconds": 1e3 * statistics.median(seconds[name]),
                "ratio": statistics.median(
                    own / other for own, other in zip(seconds[name], seconds[_REFERENCE], strict=True)
                ),
            }
            for name in names
        },
    }


def _passes(optimizer: str, rows: int) -> float:
    """Forward and backward passes of curvature estimates, as a share of training's."""
    wanted, _ = default_curvature(rows)
    return curvature_share(optimizer, rows_fraction=wanted / rows, interval=CURVATURE_INTERVAL)


def _interval(name: str, whole: GPTConfig, settings: UpdateSettings) -> Callable[[], None]:
    """Ten updates of some blocks, with the curvature that belongs to them folded in."""
    device = torch.device(settings.device)
    torch.manual_seed(0)
    model = GPT(replace(whole, layers=settings.blocks)).to(device)
    recipe: dict[str, Any] = dict(preset(settings.model).recipes[name])
    if name == "sophia-k":  # as in training, and not as the library has it
        recipe = {**MATRIX_SETTINGS, **recipe}
    optimizers = Optimizers(OptimizerSettings(optimizer=name, **recipe), model, seed=0)
    for p in model.parameters():
        p.grad = torch.randn_like(p).mul_(1e-3)
    _, chunks = default_curvature(settings.tokens_per_step // whole.context)
    estimates = [(part, _curvature(part, chunks)) for part in optimizers.parts if isinstance(part, Sophia)]

    def run() -> None:
        for part, curvature in estimates:
            part.update_curvature(curvature)
        for _ in range(CURVATURE_INTERVAL):
            optimizers.step()

    return run


def _curvature(optimizer: Sophia, chunks: int) -> Sequence[Tensor]:
    """Drawn curvature as `update_curvature` takes it: of Sophia-K's matrices gradients, of all else squares."""
    drawn = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            stacked = isinstance(optimizer, SophiaK) and p.ndim == 2 and group["hidden"]
            shape = (chunks, *p.shape) if stacked else p.shape
            one = torch.randn(shape, device=p.device).mul_(1e-2)
            drawn.append(one if stacked else one.square_())
    return drawn


def _table(result: dict[str, Any]) -> Table:
    chosen = result["settings"]
    table = Table(
        title=f"An update of {chosen['model']}, {result['parameters'] / 1e6:.0f} M parameters, beside a training step "
        f"of {chosen['tokens_per_step']:,} tokens ({result['training_flops']:.2e} operations)",
        caption=f"counted operations, curvature's part spread over {CURVATURE_INTERVAL} updates; milliseconds of "
        f"{chosen['blocks']} block(s), embedding and head, median of {chosen['rounds']} interleaved rounds on "
        f"{chosen['device']}",
    )
    for column in ("optimizer", "update", "curvature passes", "together", "ms", "x AdamW"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for name, one in result["results"].items():
        parts = (f"{one[key]:.2f} %" for key in ("update_percent", "curvature_percent", "percent"))
        table.add_row(name, *parts, f"{one['milliseconds']:.1f}", f"{one['ratio']:.2f}")
    return table
