"""How many numbers a GPT-2 has, and how many operations it takes to train it."""

from dataclasses import dataclass

from sophia.model import GPTConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers that training adjusts, by their place. The tied embedding counts once."""

    embedding: int
    """Rows of the vocabulary, with padding, times the width: embedding and head."""
    positions: int
    """Learned positions."""
    matrices: int
    """The blocks' matrices: 12 times layers times width squared."""
    vectors: int
    """Scales of LayerNorms and biases."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.positions + self.matrices + self.vectors

    @property
    def multiplied(self) -> int:
        """Those that a token is multiplied with: embedding (as the head) and matrices. What bf16 copies are made of."""
        return self.embedding + self.matrices


def count_parameters(config: GPTConfig) -> ParameterCount:
    """Count without building the model."""
    norms = 2 * config.layers + 1
    biases = config.layers * (3 + 1 + 4 + 1) + norms  # in widths: attention's two, feed-forward's two, norms
    return ParameterCount(
        embedding=config.head_rows * config.width,
        positions=config.context * config.width,
        matrices=12 * config.layers * config.width**2,
        vectors=(norms + (biases if config.bias else 0)) * config.width,
    )


def flops_per_token(config: GPTConfig, context: int | None = None) -> int:
    """Floating-point operations to train on one token: 6 N + 12 · layers · width · context.

    The convention of the PaLM paper (Chowdhery et al. 2022, arXiv 2204.02311, appendix B) for model FLOPs utilisation:
    a multiplication with an addition is two operations; the backward pass costs twice the forward; attention counts as
    if every position saw all others; what activation checkpointing computes again, norms, GELU and the loss do not
    count.
    N is the number of parameters that a token is multiplied with: the blocks' matrices and the head with its padding,
    not the learned positions.

    Args:
        config: The model.
        context: Tokens in a sequence; None is the model's context.
    """
    length = config.context if context is None else context
    return 6 * count_parameters(config).multiplied + 12 * config.layers * config.width * length


def recomputed_flops_per_token(config: GPTConfig, context: int | None = None) -> int:
    """What activation checkpointing adds, which the model's FLOPs do not count: the blocks' forward pass once more.

    Without the last matrix of each, 4 of 12 parts: nothing that is saved lies behind it.
    """
    length = config.context if context is None else context
    return 2 * count_parameters(config).matrices * 8 // 12 + 4 * config.layers * config.width * length


def curvature_share(optimizer: str, *, rows_fraction: float, interval: int = 10) -> float:
    """What curvature costs, as a fraction of the training FLOPs without it.

    A Gauss-Newton-Bartlett estimate is a forward and a backward pass over a fraction of the batch. Hutchinson's is
    about three: the gradient with its graph, and a backward pass through both. Sophia-K's products and decompositions
    of matrices depend on the model alone, and are not in it.
    """
    passes = {"sophia-g": 1, "sophia-h": 3, "sophia-k": 1}.get(optimizer, 0)
    return passes * rows_fraction / interval
