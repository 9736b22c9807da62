"""Weights of a Hugging Face GPT-2 folder, to go on training from. `transformers` is not needed for it."""

import dataclasses
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sophia.gpt2_config import CONFIG, from_gpt2_config, read_gpt2_config
from sophia.gpt2_weights import PREFIX, from_gpt2, gpt2_shapes, is_mask
from sophia.hf_tokenizer import check_tokenizer as check_tokenizer
from sophia.model import GPTConfig

WEIGHTS = "model.safetensors"
_PICKLED = "pytorch_model.bin"
_HEAD = "lm_head.weight"


def import_gpt2(
    folder: Path, *, bias: bool | None = None, dropout: float | None = None, padded_vocab_size: int | None = None
) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Read a GPT-2 folder: `config.json` and `model.safetensors`, whole or in shards, or `pytorch_model.bin`.

    Args:
        folder: As `transformers` or `sophia export` writes it.
        bias: Whether our model has biases. None: unless all of the folder's are exactly zero, as those that
            `sophia export` writes for a model without.
        dropout: Rate of dropout; None takes the folder's.
        padded_vocab_size: Rows of the embedding; None adds none.

    Returns:
        The shape of our model and its weights by name, in fp32 on the CPU, as `snapshot.load_weights` takes them.

    Raises:
        ValueError: Another architecture, a setting that our model has not, a file or tensor that is missing, damaged,
            unknown or of another shape, weights that are not finite, or biases that ``bias=False`` would lose.
    """
    folder = Path(folder)
    path = folder / CONFIG
    config = from_gpt2_config(read_gpt2_config(folder), path, dropout=dropout)
    tensors = _checked(_read(folder), config, folder)
    has_bias = any(bool(tensor.any()) for name, tensor in tensors.items() if name.endswith(".bias"))
    if has_bias and bias is False:
        raise ValueError(f"{folder} has biases: import it with bias, or export it from a model without")
    config = dataclasses.replace(config, bias=has_bias if bias is None else bias, padded_vocab_size=padded_vocab_size)
    return config, from_gpt2(config, tensors)


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of all weight files, safetensors before pickles."""
    for name, tensors_of in ((WEIGHTS, _safetensors), (_PICKLED, _pickled)):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            yield from tensors_of(folder / name)
            return
        if index.is_file():
            for shard in _shards(index):
                yield from tensors_of(shard)
            return
    raise ValueError(f"{folder} has neither {WEIGHTS} nor {_PICKLED}, whole or in shards: get the folder again")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [index.parent / name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is not an index of weight files: get the folder again") from None
    for path in paths:
        if path.parent != index.parent or not path.is_file():
            raise ValueError(f"{index} names {path.name}, which is not in its folder: get the folder again")
    return paths


def _safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield name, file.get_tensor(name)
    except SafetensorError as problem:
        raise ValueError(f"{path} is damaged or cut short ({problem}): get it again") from None


def _pickled(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        yield from tensors.items()
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as problem:
        reason = str(problem).split("\n", 1)[0]
        raise ValueError(f"{path} is damaged, or holds more than tensors ({reason}): convert it to {WEIGHTS}") from None


def _checked(found: Iterator[tuple[str, Tensor]], config: GPTConfig, folder: Path) -> dict[str, Tensor]:
    """The tensors of a GPT-2 of this shape, in fp32, by their full names."""
    shapes = gpt2_shapes(config)
    tensors: dict[str, Tensor] = {}
    head: Tensor | None = None
    for name, tensor in found:
        full = PREFIX + name.removeprefix(PREFIX)
        if name == _HEAD:
            head = tensor
        elif full in shapes:
            tensors[full] = _weight(name, tensor, shapes[full], folder)
        elif not is_mask(full):
            raise ValueError(f"{folder} has a tensor {name}, which a GPT-2 of {config.layers} layers has not")
    missing = [name for name in shapes if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{folder} lacks the tensor {missing[0]}{more}: its weights do not belong to its {CONFIG}")
    if head is not None and not torch.equal(head.float(), tensors[f"{PREFIX}wte.weight"]):
        raise ValueError(f"{folder} has {_HEAD} apart from wte.weight: only GPT-2s whose head is tied can be imported")
    return tensors


def _weight(name: str, tensor: Tensor, shape: tuple[int, ...], folder: Path) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{folder}: {name} has the shape {list(tensor.shape)}, but its {CONFIG} means {list(shape)}: "
            "get both from one place"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{folder}: {name} is of {tensor.dtype}: only weights in floating point can be imported")
    weight = tensor.float()
    if not bool(weight.isfinite().all()):
        raise ValueError(f"{folder}: {name} has values that are not finite: get the folder again")
    return weight
