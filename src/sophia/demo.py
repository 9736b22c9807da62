"""`sophia demo`: AdamW against Sophia-G on text that the machine already has, drawn as it happens."""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from sophia import machine, sweep
from sophia.plot import draw_race
from sophia.race import AdamWRecipe, RaceSettings, Run, SophiaGRecipe, Text, prepare_text, race, start_runs
from sophia.sample import generate

_PROMPT = "def "
_SAMPLE_TOKENS = 160


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of `sophia demo`."""

    race: Annotated[RaceSettings, tyro.conf.arg(name="")] = field(default_factory=RaceSettings)
    """The race itself."""
    out: Path = Path("demo-out")
    """Folder for race.png, results.json and sample.txt."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of Sophia-G's momentum and curvature; bf16 is rounded stochastically."""
    sweep: bool = False
    """Search for each optimizer's settings instead, and write benchmarks/results/demo-sweep.json and docs/demo-sweep.md
    below the present folder. Takes the time of some ten races."""


def demo(settings: Annotated[DemoSettings, tyro.conf.arg(name="")]) -> None:
    """Train two small GPTs side by side, one by AdamW and one by Sophia-G, on the same weights and batches."""
    console = Console()
    if settings.sweep:
        if settings.state_dtype != "fp32":
            raise ValueError("state_dtype has no meaning with --sweep: leave one of them out")
        _sweep(settings.race, console)
        return
    settings.out.mkdir(parents=True, exist_ok=True)  # now, not after minutes of training
    with console.status("reading this machine's own text and learning an encoding of it"):
        text = prepare_text(settings.race)
    runs = start_runs(settings.race, [AdamWRecipe(), SophiaGRecipe(state_dtype=settings.state_dtype)])
    _introduce(settings.race, runs, text, console)
    _watch(settings.race, runs, text, console)

    results = report(settings.race, runs, text)
    machine.write_json(settings.out / "results.json", results)
    picture = draw_race(runs, settings.out / "race.png", tokens_per_step=settings.race.tokens_per_step)
    sample = _samples(runs, text, settings.race.seed)
    (settings.out / "sample.txt").write_text(sample, encoding="utf-8")
    console.print(_table(runs))
    console.print(results["verdict"], highlight=False)
    console.print(f"\n[bold]What they write[/] after {_PROMPT!r}:\n")
    console.print(sample, markup=False, highlight=False, soft_wrap=True)
    console.print(f"plot: {picture}   numbers: {settings.out / 'results.json'}", highlight=False, soft_wrap=True)


def report(settings: RaceSettings, runs: Sequence[Run], text: Text) -> dict[str, Any]:
    """All that was measured."""
    return {
        "settings": dataclasses.asdict(settings),
        "text_sha256": text.fingerprint,
        "machine": machine.describe(),
        "verdict": verdict(runs),
        "runs": [
            {
                "optimizer": run.name,
                "settings": dataclasses.asdict(run.recipe),
                "steps": len(run.losses),
                "seconds": run.seconds,
                "val_loss": _finite(run.final_loss),
                "clip_fractions": run.clip_fractions,
                "validations": [dataclasses.asdict(point) | {"loss": _finite(point.loss)} for point in run.validations],
                "losses": [_finite(loss) for loss in run.losses],
            }
            for run in runs
        ],
    }


def verdict(runs: Sequence[Run]) -> str:
    """One sentence about who was ahead, whoever it was."""
    adamw, sophia = runs
    if adamw.diverged or sophia.diverged:
        lost = " and ".join(run.name for run in runs if run.diverged)
        return f"{lost} diverged. One seed, one tiny model: no verdict on the optimizers."
    difference = adamw.final_loss - sophia.final_loss
    passed = sophia.first_at_or_below(adamw.final_loss)
    if passed is not None:
        saved = f"it had AdamW's final loss after {passed.step / len(adamw.losses):.0%} of the steps and "
        saved += f"{passed.seconds / adamw.seconds:.0%} of the seconds"
        result = f"Sophia-G ended {abs(difference):.3f} nats below AdamW; {saved}."
    else:
        reached = adamw.first_at_or_below(sophia.final_loss)
        assert reached is not None
        result = f"AdamW ended {abs(difference):.3f} nats below Sophia-G, and had Sophia-G's final loss after "
        result += f"{reached.step / len(sophia.losses):.0%} of the steps."
    return f"{result} One seed, one tiny model: a look at both, no verdict."


def _introduce(settings: RaceSettings, runs: Sequence[Run], text: Text, console: Console) -> None:
    size = sum(p.numel() for p in runs[0].model.parameters())
    console.print(
        f"A GPT-2 of {size / 1e6:.2f} M parameters ({settings.layers} layers, {settings.width} wide), {settings.steps} "
        f"steps of {settings.tokens_per_step} tokens;\n{text.documents} documents of this Python's library and manual, "
        f"{len(text.train) / 1e6:.1f} M tokens, of which each run sees "
        f"{settings.steps * settings.tokens_per_step / 1e6:.1f} M.",
        highlight=False,
    )
    for run in runs:
        recipe = run.recipe
        other = f"gamma {recipe.gamma:g}" if isinstance(recipe, SophiaGRecipe) else f"beta2 {recipe.beta2:g}"
        console.print(
            f"  {run.name:9} learning rate {recipe.lr:g}, {other}, decay {recipe.weight_decay:g}", highlight=False
        )


def _watch(settings: RaceSettings, runs: Sequence[Run], text: Text, console: Console) -> None:
    """Run the race and show it: live bars on a terminal, a line now and then elsewhere."""
    if not console.is_terminal:
        every = max(1, settings.steps // 10)
        for step in race(settings, runs, text):
            if step % every == 0 or step == settings.steps:
                shown = "   ".join(f"{run.name} {_recent_loss(run)} (val {run.final_loss:.3f})" for run in runs)
                console.print(f"step {step}/{settings.steps}   {shown}", highlight=False, soft_wrap=True)
        return
    with _bars(console) as progress:
        tasks = [
            progress.add_task(run.name, total=settings.steps, loss="", val="", clipped="", rate="") for run in runs
        ]
        for step in race(settings, runs, text):
            for task, run in zip(tasks, runs, strict=True):
                rate = len(run.losses) * settings.tokens_per_step / run.seconds if run.seconds else 0.0
                progress.update(
                    task,
                    completed=len(run.losses),
                    loss=_recent_loss(run),
                    val=f"{run.final_loss:.3f}",
                    clipped=f"{run.clip_fractions[-1]:.0%}" if run.clip_fractions else "",
                    rate=f"{rate / 1e3:.1f}k tok/s" if step else "",
                )


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("[bold]{task.description:9}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("val {task.fields[val]}"),
        TextColumn("{task.fields[rate]}"),
        TextColumn("clipped {task.fields[clipped]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        yield progress


def _recent_loss(run: Run) -> str:
    recent = run.losses[-20:]
    return f"{sum(recent) / len(recent):.3f}" if recent else "  –  "


def _table(runs: Sequence[Run]) -> Table:
    adamw, _ = runs
    table = Table(title="The race", title_justify="left")
    for heading in ("optimizer", "steps", "seconds", "final validation loss", "clipped", "passed AdamW's final loss"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for run in runs:
        passed = None if run is adamw else run.first_at_or_below(adamw.final_loss)
        where = f"step {passed.step}, {passed.seconds:.0f} s" if passed else "never"
        clipped = f"{sum(run.clip_fractions) / len(run.clip_fractions):.0%}" if run.clip_fractions else "–"
        table.add_row(
            run.name,
            str(len(run.losses)),
            f"{run.seconds:.1f}",
            f"{run.final_loss:.4f}",
            clipped,
            "–" if run is adamw else where,
        )
    return table


def _samples(runs: Sequence[Run], text: Text, seed: int) -> str:
    parts = []
    for run in runs:
        prompt = torch.tensor([text.tokenizer.encode(_PROMPT).ids])
        generator = torch.Generator().manual_seed(seed)
        tokens = generate(run.model, prompt, _SAMPLE_TOKENS, temperature=0.8, top_k=50, generator=generator)
        parts.append(f"--- {run.name} ---\n{text.tokenizer.decode(tokens[0].tolist()).strip()}\n")
    return "\n".join(parts)


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None  # JSON has no infinity


def _sweep(settings: RaceSettings, console: Console) -> None:
    text = prepare_text(settings)

    def done(trial: sweep.Trial) -> None:
        console.print(f"{trial.recipe}: {trial.loss:.4f}", highlight=False, soft_wrap=True)

    def run(recipes: Sequence[Any]) -> list[sweep.Trial]:
        return sweep.run_trials(settings, recipes, processes=os.cpu_count() or 1, done=done) if recipes else []

    trials = sweep.search(sweep.SEARCHES, run)
    for path in sweep.write(settings, trials, text.fingerprint, Path.cwd()):
        console.print(f"written to {path}", highlight=False)
