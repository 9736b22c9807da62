"""A folder that Hugging Face's `transformers` loads as a GPT-2, proved before it gets its name.

It is written without `transformers`, beside its final place, and checked by loading it. Only then is it renamed, so a
folder under the asked-for name is whole and right.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer

from sophia.data.shards import vocabulary_size
from sophia.export_check import Check, check_export, require_transformers
from sophia.gpt2_config import CONFIG, to_gpt2_config
from sophia.gpt2_weights import to_gpt2
from sophia.hf_tokenizer import write_tokenizer
from sophia.import_hf import WEIGHTS
from sophia.machine import write_json
from sophia.model import GPT


def check_possible(folder: Path, *, overwrite: bool, check: bool) -> None:
    """Refuse what `export_model` cannot do whatever the model is, before one is loaded.

    Raises:
        ValueError: The folder exists, and is not an exported model to overwrite; or `transformers` is missing.
    """
    if folder.exists() or folder.is_symlink():
        if not overwrite:
            raise ValueError(f"{folder} exists: name a new folder, or export with --overwrite")
        if folder.is_symlink() or not ((folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()):
            raise ValueError(f"{folder} is not an exported model, so it is not overwritten: name a new folder")
    if check:
        require_transformers()


def export_model(
    model: GPT,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    end_of_text: int | None,
    overwrite: bool = False,
    check: bool = True,
) -> Check | None:
    """Write a model and its tokenizer as a folder for `transformers`.

    Args:
        model: Weights are written in fp32, without the rows that pad the vocabulary.
        tokenizer: The one that the model was trained with.
        folder: Made by this; folders above it too.
        end_of_text: Id of the token between documents, which becomes GPT-2's bos and eos; None if there is none.
        overwrite: Replace the folder if it is an exported model.
        check: Load it with `transformers` and compare logits and tokens.

    Returns:
        What the check found; None without it.

    Raises:
        ValueError: The folder exists, the tokenizer has ids that the model has not, `transformers` is missing, or what
            it loads differs.
        OSError: The folder cannot be written. After any error there is no new folder, and an old one is as it was.
    """
    folder = Path(folder)
    check_possible(folder, overwrite=overwrite, check=check)
    ids = vocabulary_size(tokenizer)
    if ids > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {ids} ids, but the model's vocabulary {model.config.vocab_size}: "
            "export it with the tokenizer it was trained with"
        )
    if end_of_text is not None and tokenizer.id_to_token(end_of_text) is None:
        raise ValueError(f"end_of_text is {end_of_text}, which is no id of the tokenizer")

    def fill(partial: Path) -> Check | None:
        _write(model, tokenizer, partial, end_of_text=end_of_text)
        return check_export(model, tokenizer, partial) if check else None

    return _appear(folder, fill)


def _write(model: GPT, tokenizer: Tokenizer, folder: Path, *, end_of_text: int | None) -> None:
    write_json(folder / CONFIG, to_gpt2_config(model.config, end_of_text=end_of_text))
    generation = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    write_json(folder / "generation_config.json", generation)
    write_tokenizer(tokenizer, folder, context=model.config.context, end_of_text=end_of_text)
    tensors = to_gpt2(model.config, model.state_dict())
    whole = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as problem:  # a full disk, for one
        raise OSError(f"{folder / WEIGHTS} could not be written: {problem}") from None


def _appear(folder: Path, fill: Callable[[Path], Check | None]) -> Check | None:
    """Fill a folder beside the final one, then rename it; on any error only folders above it may be left."""
    folder = folder.absolute()
    partial = folder.with_name(f".partial-{os.getpid()}-{folder.name}")
    old = folder.with_name(f".old-{os.getpid()}-{folder.name}")
    partial.mkdir(parents=True)
    try:
        result = fill(partial)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return result
