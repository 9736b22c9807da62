"""`config.json` of Hugging Face's GPT-2: our model's shape written as one, and one read as our model's shape."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sophia.model import GPTConfig

CONFIG = "config.json"

_NORM_EPSILON = 1e-5  # torch's LayerNorm and GPT-2's
_SIZES = {
    "vocab_size": "vocab_size",
    "context": "n_positions",
    "layers": "n_layer",
    "heads": "n_head",
    "width": "n_embd",
}
_DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
_DEFAULT_DROPOUT = 0.1
_ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# What our model cannot do otherwise; the values are those that GPT-2 has when a file does not say.
_FIXED: dict[str, Any] = {
    "scale_attn_weights": True,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "layer_norm_epsilon": _NORM_EPSILON,
    "quantization_config": None,
}


def to_gpt2_config(config: GPTConfig, *, end_of_text: int | None) -> dict[str, Any]:
    """The contents of `config.json` for a model of ours; the vocabulary's padding is not in it."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "n_inner": None,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        **dict.fromkeys(_DROPOUTS, config.dropout),
        "layer_norm_epsilon": _NORM_EPSILON,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": config.attention_scale_by_layer,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "use_cache": True,
        "dtype": "float32",
    }


def read_gpt2_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` and check that it is a GPT-2's.

    Raises:
        ValueError: There is none, it is not JSON, or of another architecture.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give one with a GPT-2's {CONFIG} and model.safetensors")
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG}, so it is not a Hugging Face model folder: give one of a GPT-2")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path} is not JSON ({problem}): get the folder again") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "gpt2":
        raise ValueError(f"{path} has model_type {kind!r}: only GPT-2 folders (model_type 'gpt2') can be imported")
    assert isinstance(values, dict)  # a kind was found in it
    return values


def from_gpt2_config(values: Mapping[str, Any], path: Path, *, dropout: float | None = None) -> GPTConfig:
    """The shape of our model, with biases, that computes what this GPT-2 does.

    Args:
        values: The contents of `config.json`.
        path: Named in errors.
        dropout: Used instead of the file's.

    Raises:
        ValueError: A size is missing or impossible, or GPT-2 would compute something that our model cannot.
    """
    sizes = {ours: _size(values, theirs, path) for ours, theirs in _SIZES.items()}
    for name, needed in _FIXED.items():
        value = values.get(name, needed)
        if value != needed:
            raise ValueError(f"{path} has {name} {value!r}: only GPT-2s with {needed!r} can be imported")
    inner = values.get("n_inner")
    if inner not in (None, 4 * sizes["width"]):
        raise ValueError(
            f"{path} has n_inner {inner!r}: only GPT-2s with {4 * sizes['width']} (4 n_embd) can be imported"
        )
    activation = values.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(
            f"{path} has activation_function {activation!r}: only GPT-2s with {', '.join(_ACTIVATIONS)} can be imported"
        )
    rate = _dropout(values, path) if dropout is None else dropout
    try:
        return GPTConfig(
            vocab_size=sizes["vocab_size"],
            context=sizes["context"],
            layers=sizes["layers"],
            heads=sizes["heads"],
            width=sizes["width"],
            bias=True,
            dropout=rate,
            activation=_ACTIVATIONS[activation],
            attention_scale_by_layer=bool(values.get("scale_attn_by_inverse_layer_idx", False)),
        )
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None


def _size(values: Mapping[str, Any], name: str, path: Path) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{path} has {name} {value!r}: it must be a whole number of at least 1")
    return value


def _dropout(values: Mapping[str, Any], path: Path) -> float:
    rates = {name: values.get(name, _DEFAULT_DROPOUT) for name in _DROPOUTS}
    rate = next(iter(rates.values()))
    if any(other != rate for other in rates.values()) or not isinstance(rate, (int, float)):
        listed = ", ".join(f"{name} {other!r}" for name, other in rates.items())
        raise ValueError(f"{path} has {listed}: our model has one rate of dropout; say which")
    return float(rate)
