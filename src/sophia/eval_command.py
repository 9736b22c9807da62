"""`sophia eval`: what a trained model's predictions are worth on the validation split."""

import contextlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor

from sophia.data.loader import ValidationWindows, validation_windows
from sophia.data.shards import Dataset
from sophia.distributed import World, pick_device
from sophia.evaluate import Evaluation, evaluate
from sophia.hf_tokenizer import require_equal
from sophia.trained import Trained, load_trained


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Settings of `sophia eval`."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run folder, or the folder of a GPT-2 as sophia export writes it."""
    data: Path | None = None
    """Folder that sophia prepare wrote, with the model's tokenizer; open: the run's."""
    limit: int | Literal["all"] | None = None
    """Windows of the validation split, evenly spread; open: those that the run was evaluated on, or all for a model
    folder."""
    batch: int = 8
    """Windows in one forward pass."""
    checkpoint: int | Literal["latest"] = "latest"
    """Step of the checkpoint."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 computes under autocast, as training does on CUDA."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto takes CUDA, then MPS, then the CPU."""
    json: bool = False
    """Print one JSON object instead of lines for people."""

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated, before a model is loaded."""
        for name in ("limit", "batch"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


def evaluate_command(settings: Annotated[EvalSettings, tyro.conf.arg(name="")]) -> None:
    """Measure loss, perplexity and bits per byte of a trained model on text that it was not trained on."""
    device = pick_device(settings.device)
    trained = load_trained(settings.run, settings.checkpoint, device)
    dataset = _dataset(settings, trained)
    limit = trained.eval_windows if settings.limit is None else None if settings.limit == "all" else settings.limit
    windows = validation_windows(dataset, context=trained.model.config.context, limit=limit)
    with _watched(windows, Console(stderr=True)) as watched:
        found = evaluate(
            trained.model,
            watched,
            dataset.validation,
            batch=settings.batch,
            here=World(rank=0, size=1, device=device),
            autocast=lambda: _autocast(device, settings.precision),
        )
    if settings.json:
        print(json.dumps(_result(settings, trained, dataset, windows, found)))
    else:
        _show(trained, dataset, windows, found)


def _dataset(settings: EvalSettings, trained: Trained) -> Dataset:
    folder = trained.data if settings.data is None else settings.data
    if folder is None:
        raise ValueError(f"{settings.run} is a model folder, which has no data: give --data")
    if settings.data is None and not folder.is_dir():
        raise ValueError(f"the run's data folder {folder} is not there any more: give its new place as --data")
    dataset = Dataset.open(folder)
    claim = f"{folder} was prepared with another tokenizer than that of {settings.run}"
    require_equal(dataset.tokenizer(), trained.tokenizer, claim, "prepare the text with the model's own tokenizer.json")
    return dataset


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return contextlib.nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)


def _result(
    settings: EvalSettings, trained: Trained, dataset: Dataset, windows: ValidationWindows, found: Evaluation
) -> dict[str, Any]:
    return {
        "run": str(settings.run),
        "step": trained.step,
        "data": str(dataset.folder),
        "data_fingerprint": dataset.fingerprint,
        "windows": windows.count,
        "context": trained.model.config.context,
        "tokens": found.tokens,
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
    }


def _show(trained: Trained, dataset: Dataset, windows: ValidationWindows, found: Evaluation) -> None:
    which = "" if trained.step is None else f"step {trained.step}, "
    size = f"{windows.count} windows of {trained.model.config.context}"
    print(f"{which}{found.tokens} tokens in {size} from the validation split of {dataset.folder}")
    print(f"loss           {found.loss:.4f} nats a token")
    print(f"perplexity     {found.perplexity:.2f}")
    print(f"bits per byte  {found.bits_per_byte:.4f}")


class _WatchedWindows:
    """Validation windows that move a progress bar as they are handed out."""

    def __init__(self, windows: ValidationWindows, progress: Progress, task: TaskID) -> None:
        self.count = windows.count
        self._windows, self._progress, self._task = windows, progress, task

    def batch(self, rows: range) -> tuple[Tensor, Tensor]:
        """As `ValidationWindows.batch`."""
        self._progress.update(self._task, completed=rows.start)
        return self._windows.batch(rows)


@contextlib.contextmanager
def _watched(windows: ValidationWindows, console: Console) -> Iterator[ValidationWindows]:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=windows.count)
        yield cast("ValidationWindows", _WatchedWindows(windows, progress, task))
