"""A trained model to use, from a run folder or from a Hugging Face GPT-2 folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from sophia.gpt2_config import CONFIG, read_gpt2_config
from sophia.hf_tokenizer import read_tokenizer
from sophia.import_hf import import_gpt2
from sophia.model import GPT
from sophia.run import load_run
from sophia.snapshot import load_weights


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model with what it takes to turn text into its tokens and back."""

    model: GPT
    """In evaluation mode, on the device."""
    tokenizer: Tokenizer
    """Turns text into ids and back."""
    end_of_text: int | None
    """The id that stands between documents."""
    step: int | None
    """Updates done; None for a model folder, which does not say."""
    data: Path | None
    """The data that it was trained on; None for a model folder."""
    eval_windows: int | None
    """Validation windows on which training measured it; None for a model folder."""


def load_trained(folder: Path, checkpoint: int | Literal["latest"], device: torch.device) -> Trained:
    """Load a run's checkpoint, or a GPT-2 folder as `sophia export` and `transformers` write it.

    Raises:
        ValueError: It is neither, or damaged, or there is no such checkpoint.
    """
    if (folder / CONFIG).is_file():
        return _from_model_folder(folder, checkpoint, device)
    run = load_run(folder, checkpoint, device)
    return Trained(
        model=run.model,
        tokenizer=run.tokenizer,
        end_of_text=run.end_of_text,
        step=run.step,
        data=run.data,
        eval_windows=run.settings.evaluation.eval_windows,
    )


def _from_model_folder(folder: Path, checkpoint: int | Literal["latest"], device: torch.device) -> Trained:
    if checkpoint != "latest":
        raise ValueError(f"{folder} is a model folder and has no checkpoint {checkpoint}: leave --checkpoint out")
    tokenizer = read_tokenizer(folder)
    config, weights = import_gpt2(folder)
    model = GPT(config)
    load_weights(model, weights)
    end = read_gpt2_config(folder).get("eos_token_id")
    known = isinstance(end, int) and tokenizer.id_to_token(end) is not None
    return Trained(
        model=model.to(device).eval(),
        tokenizer=tokenizer,
        end_of_text=end if known else None,
        step=None,
        data=None,
        eval_windows=None,
    )
