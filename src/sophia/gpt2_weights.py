"""The same weights under two sets of names: our GPT's and those of Hugging Face's GPT-2.

GPT-2 stores the weight of a linear layer as [inputs, outputs], the transpose of torch's; embeddings and norms are the
same in both. Its linear layers and norms always have a bias, so a model without biases is written with zeros.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sophia.model import GPT, GPTConfig

PREFIX = "transformer."

# Inside a block: our module, theirs, and whether it is a linear layer.
_BLOCK_MODULES = (
    ("attention_norm", "ln_1", False),
    ("attention.queries_keys_values", "attn.c_attn", True),
    ("attention.output", "attn.c_proj", True),
    ("feed_forward_norm", "ln_2", False),
    ("feed_forward.expand", "mlp.c_fc", True),
    ("feed_forward.output", "mlp.c_proj", True),
)
_EMBEDDINGS = ("wte", "wpe")
# Causal masks, which old files store like weights.
_MASK = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")


def to_gpt2(config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our `state_dict` in GPT-2's names and layout, without the rows that only pad the vocabulary.

    The tied head is left out, as `transformers` does. Tensors are views of ours where that is possible.
    """
    theirs: dict[str, Tensor] = {}
    for ours, name, linear in _modules(config):
        weight = weights[f"{ours}.weight"].detach()
        if name == "wte":
            weight = weight[: config.vocab_size]
        theirs[f"{PREFIX}{name}.weight"] = weight.T if linear else weight
        if name not in _EMBEDDINGS:
            # Before the transposition, outputs come first; a norm has nothing else.
            bias = weights[f"{ours}.bias"].detach() if config.bias else weight.new_zeros(weight.shape[0])
            theirs[f"{PREFIX}{name}.bias"] = bias
    return theirs


def from_gpt2(config: GPTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's tensors, of the shapes of `gpt2_shapes`, under our names; rows that only pad the vocabulary are zero.

    The embedding is there once, not a second time as the head: as `snapshot.load_weights` wants it.
    """
    weights: dict[str, Tensor] = {}
    for ours, name, linear in _modules(config):
        weight = tensors[f"{PREFIX}{name}.weight"]
        if name == "wte":
            weight = torch.cat([weight, weight.new_zeros(config.head_rows - config.vocab_size, config.width)])
        weights[f"{ours}.weight"] = weight.T.contiguous() if linear else weight
        if config.bias and name not in _EMBEDDINGS:
            weights[f"{ours}.bias"] = tensors[f"{PREFIX}{name}.bias"]
    return weights


def gpt2_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a GPT-2 of this size has."""
    with torch.device("meta"):
        weights = GPT(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in to_gpt2(config, weights).items()}


def is_mask(name: str) -> bool:
    """Whether a tensor is one of the causal masks that old files carry: no weight."""
    return _MASK.fullmatch(name) is not None


def _modules(config: GPTConfig) -> Iterator[tuple[str, str, bool]]:
    """Our module, theirs without the prefix, and whether it is a linear layer."""
    yield "tokens", "wte", False
    yield "positions", "wpe", False
    for layer in range(config.layers):
        for ours, theirs, linear in _BLOCK_MODULES:
            yield f"blocks.{layer}.{ours}", f"h.{layer}.{theirs}", linear
    yield "final_norm", "ln_f", False
