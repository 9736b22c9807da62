"""GPT-2 as the Sophia paper trains it: pre-LayerNorm blocks, GELU, learned positions, one matrix for both ends.

The paper's models (section 3.1) have no biases and no dropout; both stay available as settings. Matrices start
from a normal distribution with a standard deviation of 0.02; those that write into the residual stream start
smaller by the square root of how many of them there are, so that the stream's variance does not grow with depth.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from sophia.cache import KeyValueCache

INITIAL_STD = 0.02
PADDING_MULTIPLE = 128
"""GPUs multiply matrices faster when the vocabulary is a multiple of this: 50257 becomes 50304."""

Readout = Callable[[Tensor, Tensor, int], Tensor]
"""Called inside the forward pass, where FSDP2 has the head's weight gathered and DDP sees what comes of it, as
``readout(hidden, weight, vocab_size)``: hidden states [batch, time, width], weight [rows, width] with at least
vocab_size rows (those beyond are padding, of probability zero) -> a scalar."""


def padded_vocabulary(vocab_size: int, multiple: int = PADDING_MULTIPLE) -> int:
    """The least multiple of ``multiple`` that holds ``vocab_size`` ids."""
    return -(-vocab_size // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT-2."""

    vocab_size: int
    """Number of token ids."""
    context: int
    """Longest sequence in tokens; the number of learned positions."""
    layers: int
    """Number of transformer blocks."""
    heads: int
    """Attention heads in each block; must divide the width."""
    width: int
    """Size of the residual stream."""
    bias: bool = False
    """Whether linear layers and LayerNorms carry a bias. The paper's do not, the original GPT-2's do."""
    dropout: float = 0.0
    """Probability of zeroing an activation while training."""
    padded_vocab_size: int | None = None
    """Rows of the embedding, which is also the output head; those from vocab_size on have logit -inf and are never
    trained. None is vocab_size: no padding."""
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    """Between the feed-forward's linear layers: GELU, or its tanh approximation, with which OpenAI trained GPT-2."""
    attention_scale_by_layer: bool = False
    """Divide the attention scores of layer l (from 0) by l + 1 as well, against blow-ups of deep models."""
    activation_checkpointing: bool = False
    """Keep only the input of each block for the backward pass and compute the rest again: less memory, a third more
    arithmetic."""

    def __post_init__(self) -> None:
        """Refuse a shape that no model can have."""
        for name in ("vocab_size", "context", "layers", "heads", "width"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not divisible by heads {self.heads}; "
                f"choose for example width {self.heads * max(1, round(self.width / self.heads))}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.padded_vocab_size is not None and self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size is {self.padded_vocab_size}, fewer than the {self.vocab_size} ids of the "
                f"vocabulary; choose for example {padded_vocabulary(self.vocab_size)}"
            )
        if self.activation not in ("gelu", "gelu_tanh"):
            raise ValueError(f"activation is {self.activation!r}; it must be 'gelu' or 'gelu_tanh'")

    @property
    def head_rows(self) -> int:
        """Rows of the embedding and size of the logits: the vocabulary with its padding."""
        return self.vocab_size if self.padded_vocab_size is None else self.padded_vocab_size


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each position sees itself and what came before."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = config.heads
        self.context = config.context
        self.dropout = config.dropout
        self.scale = 1 / math.sqrt(config.width // config.heads)
        if config.attention_scale_by_layer:
            self.scale /= layer + 1
        self.queries_keys_values = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.output = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Mix positions: [batch, time, width] -> the same shape. With a cache they see the positions in it, too."""
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in self.queries_keys_values(x).split(width, dim=2)
        )  # each [batch, heads, time, width / heads]
        visible = None
        if cache is not None:
            k, v = cache.extend(self.layer, k, v, self.context)
            if 1 < time < k.shape[2]:  # several new positions behind old ones: each sees up to itself
                visible = torch.ones(time, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - time)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=time == k.shape[2],
            scale=self.scale,
        )
        mixed = mixed.transpose(1, 2).reshape(batch, time, width)
        return F.dropout(self.output(mixed), self.dropout, self.training)


class FeedForward(nn.Module):
    """Two linear layers, four times as wide between them, on every position alone."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.expand = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.output = nn.Linear(4 * config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position: [batch, time, width] -> the same shape."""
        return F.dropout(self.output(F.gelu(self.expand(x), approximate=self.approximate)), self.dropout, self.training)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each reading a normalized copy of the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = CausalSelfAttention(config, layer)
        self.feed_forward_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Add both branches to the residual stream: [batch, time, width] -> the same shape."""
        x = x + self.attention(self.attention_norm(x), cache)
        mixed: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return mixed


class Head(nn.Linear):
    """Scores of the next token. Rows of the weight beyond the vocabulary give -inf: probability and gradient zero.

    They do by way of the product's bias, which costs no pass over the logits. The bias is made at each call: as a
    buffer it would be broadcast by DDP at every step, and be garbage after `to_empty`.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, bias=False)
        self.vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        """Score: [..., width] -> logits [..., rows of the weight]."""
        rows = self.weight.shape[0]
        if rows == self.vocab_size:
            return F.linear(x, self.weight)
        ids = torch.arange(rows, device=x.device)
        bias = self.weight.new_zeros(rows).masked_fill_(ids >= self.vocab_size, -math.inf)
        return F.linear(x, self.weight, bias)


class GPT(nn.Module):
    """GPT-2: token ids in, logits of the next token at every position out.

    Args:
        config: The shape.
        generator: A CPU generator of the initial weights; None is torch's global one, which the constructors of
            torch's modules draw from too.

    On the meta device nothing is drawn; `to_empty(device=…)` and then :meth:`initialize` finish the model.

    Example:
        >>> model = GPT(GPTConfig(vocab_size=256, context=32, layers=2, heads=2, width=16))
        >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 256])
    """

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        # Without padding first: what the modules draw for themselves must not depend on it.
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.head = Head(config.width, config.vocab_size)
        if config.head_rows > config.vocab_size:
            self.tokens.weight = nn.Parameter(self.tokens.weight.new_zeros(config.head_rows, config.width))
            self.tokens.num_embeddings = self.head.out_features = config.head_rows
        self.initialize(generator)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights anew, in place.

        They are a function of the generator's state and the shape alone, the same on every device, whatever the
        padding, sharded or not: each parameter is drawn on the CPU in fp32, one after another.

        Args:
            generator: A CPU generator; None is torch's global one.
        """
        self.head.weight = self.tokens.weight  # tied: one matrix reads tokens and scores them; `to_empty` unties
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim < 2:
                parameter.fill_(1)
            else:
                # Two branches a block write into the residual stream.
                writers = 2 * self.config.layers if name.endswith("output.weight") else 1
                drawn = torch.zeros(parameter.shape, device="cpu", dtype=torch.float32)
                real = drawn[: self.config.vocab_size] if parameter is self.tokens.weight else drawn
                real.normal_(std=INITIAL_STD / math.sqrt(writers), generator=generator)
                _assign(parameter, drawn)

    def forward(self, tokens: Tensor, readout: Readout | None = None) -> Tensor:
        """Score the next token at every position: ids [batch, time] -> logits [batch, time, vocabulary with padding].

        Args:
            tokens: Ids.
            readout: What to make of the hidden states in place of logits, which then never exist as a whole; its
                result is returned.

        Raises:
            ValueError: ``tokens`` is longer than the context.
        """
        hidden = self.hidden(tokens)
        if readout is None:
            logits: Tensor = self.head(hidden)
            return logits
        return _read_out(readout, hidden, self.head.weight, self.config.vocab_size)

    def hidden(self, tokens: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """What the head reads: ids [batch, time] -> [batch, time, width].

        Args:
            tokens: With a cache, the ids that follow those in it.
            cache: Read and extended.

        Raises:
            ValueError: The tokens, with those in the cache, are longer than the context.
        """
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.context:
            raise ValueError(
                f"a sequence of {end} tokens does not fit the context of {self.config.context}; "
                "cut it, or build the model with a longer context"
            )
        positions = torch.arange(start, end, device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)  # [batch, time, width]
        x = F.dropout(x, self.config.dropout, self.training)
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled() and cache is None
        for block in self.blocks:
            if recompute:
                drops = self.training and self.config.dropout > 0  # then the same masks have to come again
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=drops)
            else:
                x = block(x, cache)
        if cache is not None:
            cache.length = end
        normalized: Tensor = self.final_norm(x)
        return normalized

    @property
    def num_parameters(self) -> int:
        """How many numbers there are to train; the tied matrix counts once, padding is left out."""
        padding = (self.config.head_rows - self.config.vocab_size) * self.config.width
        return sum(parameter.numel() for parameter in self.parameters()) - padding


def _call(readout: Readout, hidden: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
    return readout(hidden, weight, vocab_size)


# Outside compiled graphs: a new readout comes with every micro-batch, and must not mean a new graph.
_read_out: Callable[[Readout, Tensor, Tensor, int], Tensor] = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]


def _assign(parameter: Tensor, full: Tensor) -> None:
    if isinstance(parameter, DTensor):  # every rank has drawn the same: each takes its part, without a message
        full = full.to(parameter.device, parameter.dtype)
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)
