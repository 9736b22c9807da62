"""A run folder: where its files are, and how a trained model comes out of it again."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from sophia import checkpoint, snapshot
from sophia.config import TrainSettings, read_toml
from sophia.model import GPT, GPTConfig
from sophia.occupied import occupied


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path
    """The folder."""

    @property
    def config(self) -> Path:
        """The settings, nothing left open."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """What was measured, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer of the data."""
        return self.path / "tokenizer.json"

    @property
    def checkpoints(self) -> Path:
        """One folder for each checkpoint."""
        return self.path / "checkpoints"

    def settings(self) -> TrainSettings:
        """What the run was started with.

        Raises:
            ValueError: This is no run folder.
        """
        if not self.config.is_file():
            what = "has no config.toml" if self.path.is_dir() else "does not exist"
            raise ValueError(f"{self.path} is not a run folder: it {what}; give the folder that sophia train wrote")
        return read_toml(self.config)

    def occupied(self) -> AbstractContextManager[None]:
        """Keep other processes from training this run as long as the context lasts.

        Raises:
            ValueError: Another process is at it.
            OSError: The folder cannot be written.
        """
        return occupied(self.path, f"{self.path} is being trained")


@dataclass(frozen=True, kw_only=True)
class LoadedRun:
    """A trained model with what belongs to it."""

    model: GPT
    """In evaluation mode, with the checkpoint's weights."""
    tokenizer: Tokenizer
    """Turns text into ids and back."""
    step: int
    """Updates done."""
    settings: TrainSettings
    """What it was trained with."""
    data: Path
    """The data that it was trained on."""
    end_of_text: int
    """The id that stands between documents."""


def load_run(folder: Path, checkpoint_: str | int = "latest", device: str | torch.device = "cpu") -> LoadedRun:
    """Load a trained model.

    Args:
        folder: A run folder.
        checkpoint_: The step of the checkpoint, or "latest".
        device: Where the model goes.

    Raises:
        ValueError: It is not a run folder, or has no such checkpoint, or that is damaged.
    """
    run = RunFolder(Path(folder))
    settings = run.settings()
    place = checkpoint.choose(run.checkpoints, checkpoint_)
    tokenizer = _read_tokenizer(run.tokenizer)
    state, weights = checkpoint.read_model(place)
    model = GPT(GPTConfig(**state["model"])).to(device)
    snapshot.load_weights(model, weights)
    assert settings.data is not None
    return LoadedRun(
        model=model.eval(),
        tokenizer=tokenizer,
        step=state["step"],
        settings=settings,
        data=settings.data,
        end_of_text=state["end_of_text"],
    )


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as problem:  # the library raises nothing more special
        raise ValueError(
            f"{path} cannot be read ({problem}): copy the tokenizer.json of the run's data folder there"
        ) from None
