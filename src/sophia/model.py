"""GPT-2 as the Sophia paper trains it: pre-LayerNorm blocks, GELU, learned positions, one matrix for both ends.

The paper's models (section 3.1) have no biases and no dropout; both stay available as settings. Matrices start
from a normal distribution with a standard deviation of 0.02; those that write into the residual stream start
smaller by the square root of how many of them there are, so that the stream's variance does not grow with depth.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITIAL_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT-2."""

    vocab_size: int
    """Number of token ids: rows of the embedding, which is also the output head."""
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


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each position sees itself and what came before."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.queries_keys_values = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.output = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mix positions: [batch, time, width] -> the same shape."""
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for part in self.queries_keys_values(x).split(width, dim=2)
        )  # each [batch, heads, time, width / heads]
        mixed = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        mixed = mixed.transpose(1, 2).reshape(batch, time, width)
        return F.dropout(self.output(mixed), self.dropout, self.training)


class FeedForward(nn.Module):
    """Two linear layers, four times as wide between them, on every position alone."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.expand = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.output = nn.Linear(4 * config.width, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position: [batch, time, width] -> the same shape."""
        return F.dropout(self.output(F.gelu(self.expand(x))), self.dropout, self.training)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each reading a normalized copy of the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.attention = CausalSelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches to the residual stream: [batch, time, width] -> the same shape."""
        x = x + self.attention(self.attention_norm(x))
        mixed: Tensor = x + self.feed_forward(self.feed_forward_norm(x))
        return mixed


class GPT(nn.Module):
    """GPT-2: token ids in, logits of the next token at every position out.

    The global random generator gives the initial weights; seed it to repeat them.

    Example:
        >>> model = GPT(GPTConfig(vocab_size=256, context=32, layers=2, heads=2, width=16))
        >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 256])
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.head.weight = self.tokens.weight  # tied: one matrix reads tokens and scores them
        self._initialize()

    def _initialize(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim >= 2:
                # Two branches a block write into the residual stream.
                writers = 2 * self.config.layers if name.endswith("output.weight") else 1
                nn.init.normal_(parameter, std=INITIAL_STD / math.sqrt(writers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Score the next token at every position: ids [batch, time] -> logits [batch, time, vocab_size].

        Raises:
            ValueError: ``tokens`` is longer than the context.
        """
        time = tokens.shape[1]
        if time > self.config.context:
            raise ValueError(
                f"a sequence of {time} tokens does not fit the context of {self.config.context}; "
                "cut it, or build the model with a longer context"
            )
        positions = torch.arange(time, device=tokens.device)
        x = self.tokens(tokens) + self.positions(positions)  # [batch, time, width]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.final_norm(x))
        return logits

    @property
    def num_parameters(self) -> int:
        """How many numbers training adjusts; the tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())
