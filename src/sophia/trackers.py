"""TensorBoard and Weights & Biases: they get what `metrics.jsonl` gets, under the same names."""

import importlib.util
import math
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PROJECT = "sophia"


class Tracker(Protocol):
    """Something that shows numbers elsewhere."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one line of the metrics."""

    def cut(self, step: int) -> None:
        """Take back what belongs to steps after ``step``."""

    def close(self) -> None:
        """Send what is left, and end."""


def open_trackers(names: Sequence[str], folder: Path, *, resume_step: int | None) -> list[Tracker]:
    """Start the trackers of a run.

    Args:
        names: "tensorboard", "wandb".
        folder: The run folder; trackers keep their files there, and show its settings.
        resume_step: The step from which the run goes on, or None when it begins.

    Raises:
        ValueError: A name is unknown, a package is missing, or a tracker cannot start.
    """
    check_trackers(names)
    opened: list[Tracker] = []
    try:
        for name in dict.fromkeys(names):
            opened.append(_KINDS[name](folder, resume_step))  # noqa: PERF401 - those before one that fails are closed
    except BaseException:
        for tracker in opened:
            tracker.close()
        raise
    return opened


def check_trackers(names: Iterable[str]) -> None:
    """Refuse unknown trackers and those whose package is missing.

    Raises:
        ValueError: Names the extra to install.
    """
    for name in names:
        if name not in _KINDS:
            raise ValueError(f"there is no tracker {name!r}; there are {', '.join(_KINDS)}")
        if importlib.util.find_spec(name) is None:  # their packages have their names
            raise ValueError(f"tracking with {name} needs its package: pip install 'sophia-lm[{name}]'")


class TensorBoard:
    """Event files in the run folder's `tensorboard/`: look at them with `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        self._folder = folder / "tensorboard"
        self._open(resume_step)

    def _open(self, last_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

        # TensorBoard forgets what earlier files hold of the purged step and later.
        purge_step = None if last_step is None else last_step + 1
        self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)

    def write(self, record: Mapping[str, Any]) -> None:
        """Numbers as scalars, events as text."""
        if "event" in record:
            self._writer.add_text("events", _sentence(record), record["step"])
            return
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def cut(self, step: int) -> None:
        """Begin a new file that purges."""
        self.close()
        self._open(step)

    def close(self) -> None:
        """Write out and close the file."""
        self._writer.close()


class WandB:
    """A run of the project "sophia", online or, with WANDB_MODE=offline, in files in the run folder's `wandb/`.

    It has no way back: what was logged before a return to an earlier step stays, and the steps are logged again.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        wandb: Any = importlib.import_module("wandb")
        try:
            self._run = wandb.init(
                project=_PROJECT,
                name=folder.resolve().name,
                id=_wandb_id(folder, resume_step),
                resume=None if resume_step is None else "allow",
                dir=str(folder),
                config=_settings(folder),
                settings=wandb.Settings(console="off"),  # it would wrap the terminal that the display draws on
            )
        except wandb.Error as problem:
            raise ValueError(
                f"wandb cannot start: {' '.join(str(problem).split())}; "
                "log in with `wandb login`, or set WANDB_MODE=offline"
            ) from None
        # Our own step as the axis: W&B's must grow, and after a resume ours begins below where it was.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        """Numbers as metrics, events as text."""
        if "event" in record:
            self._run.log({"event": _sentence(record), "step": record["step"]})
        else:
            self._run.log({**_scalars(record), "step": record["step"]})

    def cut(self, step: int) -> None:
        """Say where the run returned to; W&B takes nothing back."""
        self._run.log({"event": f"back to step {step}", "step": step})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


_KINDS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a line, named by its kind: "train/loss", "validation/perplexity"."""
    group = "validation" if "val_loss" in record else "train"
    return {
        f"{group}/{'loss' if key == 'val_loss' else key}": value
        for key, value in record.items()
        if key != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _sentence(event: Mapping[str, Any]) -> str:
    """spike: loss 7.5, …"""
    rest = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("step", "event"))
    return f"{event['event']}: {rest}" if rest else str(event["event"])


def _wandb_id(folder: Path, resume_step: int | None) -> str:
    """A resumed run goes on under the name that it had."""
    file = folder / "wandb-id.txt"
    if resume_step is None or not file.exists():
        file.write_text(uuid.uuid4().hex + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _settings(folder: Path) -> dict[str, Any]:
    config = folder / "config.toml"
    return tomllib.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
