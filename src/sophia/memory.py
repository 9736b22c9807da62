"""How much memory a training step takes at its peak, from the architecture alone.

The trainer's step is followed through its moments (`_moments`): each lists the tensors that are alive, and the largest
sum is the peak. With W the width, V the rows of the head, H the heads, T the context and n the tokens of a micro-batch;
s is 4 bytes, or 2 under bf16 autocast; r, the residual stream, is 4 (2 where FSDP2 casts parameters to bf16).

Saved for the backward pass, bytes for each token and block:

    2 r W             the inputs of both LayerNorms: the residual stream
    16                their means and deviations
    2 s W             the inputs of the linear layers behind them
    3 s W             queries, keys and values
    s W + 4 H         attention's result, and its log-sum-exp in fp32
    8 s W             the inputs of GELU and of the linear layer behind it
    ---------
    2 r W + 14 s W + 16 + 4 H        (64 W in fp32, 36 W in bf16, and little else)

With activation checkpointing r W, and one block's whole while it is computed again. Final norm: r W + 8.
bf16 autocast: a copy of the blocks' matrices, 2 bytes an entry. torch.compile saves the same (measured on the CPU).

The loss (sophia/loss.py) has the hidden states and their gradient, r W each for a token, and the gradient of the head's
weight, in fp32. For each row of the head and prediction *of one chunk* it has 4 bytes, of what are logits first and
their gradient last; in bf16 2 more, and a copy of the weight. What else it has is small.

The sums are those of PyTorch's own record of allocations (tests/model/test_memory.py). To them come a workspace, of
cuBLAS or of the CPU's libraries, and on the CPU the holes in the heap: glibc keeps tensors below 32 MiB there, and what
gradients leave of the room of earlier activations is too small for later ones. By measurement holes are half of the
saved activations where gradients accumulate and a fifth where they do not; with activation checkpointing three times,
or twice, what a block saves. With every tensor in pages of its own (MALLOC_MMAP_THRESHOLD_=1048576) there are
none, but a step takes a sixth longer. `sophia bench memory` compares; benchmarks/results/plan-cpu.json is its answer.
Not counted: the process itself.
"""

import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from sophia.accounting import ParameterCount, count_parameters
from sophia.loss import chunk_rows
from sophia.model import GPTConfig
from sophia.optim.kronecker import Sides, turned
from sophia.optim.products import BLOCK
from sophia.optim.soap import LARGEST as SOAP_LARGEST
from sophia.optim.sophia_k import SophiaK, together
from sophia.optim.update import BUCKET

Precision = Literal["fp32", "bf16"]
Parallel = Literal["none", "ddp", "fsdp"]

_FP32 = 4
_BF16 = 2
_SOPHIA_K_LARGEST: int = inspect.signature(SophiaK).parameters["max_basis_dim"].default
# On CUDA what PyTorch has cuBLAS keep on Hopper (8 MiB on earlier GPUs), elsewhere what libraries were seen to keep.
_WORKSPACE = {"cuda": 32 << 20}
_OTHER_WORKSPACE = 8 << 20
# Logits of a curvature estimate that exist at one time (sophia/optim/curvature/deferred.py).
_CURVATURE_BLOCK = 1 << 24


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on one device at the moment of the training step that needs most."""

    parameters: int
    """The model's own, in fp32."""
    gradients: int
    """Of the parameters, with the squares and gradients of a curvature estimate."""
    optimizer: int
    """Averages that the optimizer keeps."""
    activations: int
    """What the forward pass saves for the backward pass, and what a block's backward pass works with."""
    logits: int
    """The head's results and the loss's temporaries."""
    other: int
    """bf16 copies of matrices, gathered shards, temporaries of the optimizer's step, workspaces."""
    holes: int
    """On the CPU: room in the heap that is free, but too small for the next tensor."""
    moment: str
    """Which moment that is."""

    @property
    def total(self) -> int:
        """The sum."""
        return self.live + self.holes

    @property
    def live(self) -> int:
        """The sum of what is in use."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits + self.other


def step_memory(
    config: GPTConfig,
    *,
    micro_batch: int,
    context: int | None = None,
    optimizer: str,
    precision: Precision = "fp32",
    activation_checkpointing: bool | None = None,
    device: str = "cpu",
    accumulates: bool = True,
    curvature_rows: int | None = None,
    curvature_chunks: int = 4,
    parallel: Parallel = "none",
    ranks: int = 1,
    state_dtype: Precision = "fp32",
    basis: Sides = "smaller",
) -> MemoryEstimate:
    """The peak of a training step on each device, see the module's text.

    Args:
        config: The model.
        micro_batch: Sequences in one forward pass on one device.
        context: Tokens in a sequence; None is the model's context.
        optimizer: A name that `sophia train` knows. A foreign one, by its import path, is taken for AdamW's like.
        precision: "bf16" computes under autocast, with parameters in fp32.
        activation_checkpointing: None is the model's setting.
        device: "cpu", "cuda" or "mps".
        accumulates: Whether a step has several micro-batches, so that gradients are there during the forward pass.
        curvature_rows: Sequences in one forward pass of a curvature estimate on one device; None is `micro_batch`.
        curvature_chunks: Such passes in one estimate.
        parallel: "ddp" has everything on each rank, "fsdp" shards parameters, gradients and optimizer state.
        ranks: Devices.
        state_dtype: Of Sophia's state.
        basis: Of Sophia-K: the sides of a matrix that it turns.

    Raises:
        ValueError: The optimizer is unknown, a count is below 1, or the context is longer than the model's.
    """
    length = config.context if context is None else context
    for name, value in (("micro_batch", micro_batch), ("context", length), ("ranks", ranks)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if length > config.context:
        raise ValueError(f"context is {length}, longer than the {config.context} positions of the model")
    step = _Step(
        config=config,
        optimizer=optimizer,
        length=length,
        tokens=micro_batch * length,
        curvature_tokens=(micro_batch if curvature_rows is None else curvature_rows) * length,
        curvature_chunks=curvature_chunks,
        low=precision == "bf16",
        checkpoints=config.activation_checkpointing if activation_checkpointing is None else activation_checkpointing,
        device=device,
        accumulates=accumulates,
        sharded=parallel == "fsdp" and ranks > 1,
        replicated=parallel == "ddp" and ranks > 1,
        ranks=ranks,
        state_dtype=state_dtype,
        basis=basis,
    )
    return max(step.moments(), key=lambda moment: moment.total)


def optimizer_bytes(
    config: GPTConfig, optimizer: str, state_dtype: Precision = "fp32", basis: Sides = "smaller"
) -> int:
    """What the optimizer keeps between steps, unsharded: averages the size of parameters, in fp32 but for Sophia.

    SOAP and Sophia-K keep two square matrices more for each side that they turn. They are always in fp32, and so is
    Sophia-K's average of squared gradients, outside the blocks' matrices. A foreign optimizer, by its import path, is
    taken for one with two averages.

    Raises:
        ValueError: The optimizer is unknown.
    """
    count = count_parameters(config)
    averages = {"adamw": 2, "nadamw": 2, "lion": 1, "signum": 1, "sophia-g": 2, "sophia-h": 2}
    if ":" in optimizer:
        return _FP32 * 2 * count.total
    if optimizer == "soap":
        return _FP32 * (2 * count.total + 2 * sum(side**2 for side in _turned_sides(config)))
    if optimizer == "muon":  # momentum of the matrices, AdamW for the rest
        return _FP32 * (count.matrices + 2 * (count.total - count.matrices))
    each = _BF16 if state_dtype == "bf16" and optimizer.startswith("sophia") else _FP32
    if optimizer == "sophia-k":
        squares = 2 * sum(side**2 for side in _matrix_sides(config, basis))
        outside = count.total - count.matrices
        return each * (count.total + count.matrices) + _FP32 * (outside + squares)
    if optimizer not in averages:
        names = ", ".join([*averages, "muon", "soap", "sophia-k"])
        raise ValueError(f"optimizer {optimizer!r} is unknown; choose from {names}")
    return each * averages[optimizer] * count.total


def _turned_sides(config: GPTConfig) -> Iterator[int]:
    """Sizes of all sides that the trainer's SOAP turns: as large as a block's largest at most."""
    largest = min(4 * config.width, SOAP_LARGEST)
    for shape in (*_blocks(config), (config.head_rows, config.width), (config.context, config.width)):
        yield from (side for side in shape if side <= largest)


def _matrix_sides(config: GPTConfig, basis: Sides) -> Iterator[int]:
    """Sizes of all sides that Sophia-K turns."""
    for shape in _blocks(config):
        yield from (side for side, wanted in zip(shape, turned(shape, basis, _SOPHIA_K_LARGEST), strict=True) if wanted)


def _blocks(config: GPTConfig) -> list[tuple[int, int]]:
    """Shapes of the blocks' matrices."""
    width = config.width
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * config.layers


def block_bytes(config: GPTConfig, *, context: int, low: bool, device: str, residual: int = _FP32) -> int:
    """What one block saves for its backward pass, for each token: the table of the module's text, and dropout's.

    Dropout adds a mask for each branch. On the CPU it also leaves the fast attention kernel, so that matrices of
    H · T are saved (the weights, their mask, the product; fp32), and under autocast copies of queries, keys and values.
    """
    width, entry = config.width, _BF16 if low else _FP32
    per_token = 2 * residual * width + 14 * entry * width + 16
    if config.dropout == 0:
        return per_token + 4 * config.heads
    if device != "cpu":
        return per_token + 4 * config.heads + 2 * width  # bool masks
    copies = 3 * entry * width if low else 0
    return per_token + 2 * entry * width + copies + 12 * config.heads * context


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One training step: which tensors are alive when."""

    config: GPTConfig
    optimizer: str
    length: int
    tokens: int
    curvature_tokens: int
    curvature_chunks: int
    low: bool
    checkpoints: bool
    device: str
    accumulates: bool
    sharded: bool
    replicated: bool
    ranks: int
    state_dtype: Precision
    basis: Sides

    def moments(self) -> Iterator[MemoryEstimate]:
        """Each moment that can be the peak."""
        held = self.model if self.accumulates or self.replicated else 0  # DDP's buckets are always there
        stored = self.stored(self.tokens)
        yield self.moment(
            "loss",
            gradients=held + self.embedding,
            activations=stored + self.tokens * self.end_bytes,
            logits=self.chunk(self.tokens),
            other=self.matrix_copies + self.head_copy,
        )
        yield self.moment(
            "last block",
            gradients=held + self.embedding,
            activations=stored + self.working(self.tokens),
            other=self.late_copies,
        )
        yield self.moment("first block", gradients=self.model + self.embedding * (1 + self.accumulates))
        yield self.moment("optimizer step", gradients=self.model, other=self.step_temporaries)
        if self.optimizer == "sophia-g":
            yield from self.sampled_curvature()
        if self.optimizer == "sophia-k":
            yield from self.matrix_curvature()
        if self.optimizer == "sophia-h":
            yield from self.finite_difference()

    def moment(
        self, name: str, *, gradients: int = 0, activations: int = 0, logits: int = 0, other: int = 0
    ) -> MemoryEstimate:
        """Add what is always there; under FSDP2 a rank has its share of all that has the size of the parameters."""
        share = self.ranks if self.sharded else 1
        return MemoryEstimate(
            parameters=self.model // share,
            gradients=gradients // share,
            optimizer=optimizer_bytes(self.config, self.optimizer, self.state_dtype, self.basis) // share,
            activations=activations,
            logits=logits,
            other=other + self.gathered + _WORKSPACE.get(self.device, _OTHER_WORKSPACE),
            holes=self.holes(activations),
            moment=name,
        )

    def holes(self, activations: int) -> int:
        """What the CPU's heap loses to fragments, by measurement: see the module's text."""
        if self.device != "cpu":
            return 0
        if self.checkpoints:
            return self.tokens * self.block * (3 if self.accumulates else 2)
        return activations // (2 if self.accumulates else 5)

    def sampled_curvature(self) -> Iterator[MemoryEstimate]:
        """Gauss-Newton-Bartlett. Gradients: squares so far and, under an engine, a chunk's; DDP has them twice.

        On one device each gradient is squared as soon as it is there, the embedding's last.
        """
        held = self.model * ((self.curvature_chunks > 1) + self.replicated)
        yield from self.sampled_passes(held)
        if self.sharded or self.replicated:
            yield self.moment("curvature, first block", gradients=held + self.model + self.embedding)
        else:
            yield self.moment("curvature, first block", gradients=self.model + 2 * self.embedding)

    def sampled_passes(self, held: int) -> Iterator[MemoryEstimate]:
        """Forward and backward pass of a chunk, with so many bytes of gradients and sums beside them."""
        stored = self.stored(self.curvature_tokens)
        yield self.moment(
            "curvature, head",
            gradients=held + self.embedding,
            activations=stored + self.curvature_tokens * self.end_bytes,
            logits=2
            * self.entry
            * min(self.curvature_tokens * self.config.head_rows, _CURVATURE_BLOCK),  # and the noise
            other=self.late_copies + self.head_copy,
        )
        yield self.moment(
            "curvature, last block",
            gradients=held + self.embedding,
            activations=stored + self.working(self.curvature_tokens),
            other=self.late_copies,
        )

    def matrix_curvature(self) -> Iterator[MemoryEstimate]:
        """Gauss-Newton-Bartlett for Sophia-K. Gradients: those of a whole chunk, beside the sums so far.

        Sums are the squares and outer products of the blocks' matrices; by default nothing else has curvature. Adding
        to them takes a matrix in its basis; a new basis about nine matrices of its size, by measurement.
        """
        sides = [side**2 for side in _matrix_sides(self.config, self.basis)]
        sums, matrix = _FP32 * (self.count.matrices + sum(sides)), _FP32 * 4 * self.config.width**2
        held, gradients = sums * (self.curvature_chunks > 1), self.model * (1 + self.replicated)
        yield from self.sampled_passes(held + self.model * self.replicated)
        yield self.moment("curvature, first block", gradients=held + gradients + self.embedding)
        yield self.moment("curvature, sums", gradients=sums + gradients, other=matrix)
        yield self.moment(
            "curvature, bases", gradients=sums + self.model * self.replicated, other=9 * _FP32 * max(sides, default=0)
        )

    def finite_difference(self) -> Iterator[MemoryEstimate]:
        """Hutchinson as the trainer has it, by two gradients in fp32.

        Gradients: noise, parameters kept, both gradients; for several micro-batches one more.
        """
        plain = dataclasses.replace(self, low=False)
        held = 4 + (self.curvature_chunks > 1)
        yield self.moment(
            "curvature, loss",
            gradients=(held - 1) * self.model + self.embedding,
            activations=plain.stored(self.curvature_tokens) + self.curvature_tokens * plain.end_bytes,
            logits=plain.chunk(self.curvature_tokens),
        )
        yield self.moment("curvature, first block", gradients=held * self.model + self.embedding)

    def stored(self, tokens: int) -> int:
        """What the blocks save in a forward pass of so many tokens."""
        stream = self.residual * self.config.width
        return tokens * self.config.layers * (stream if self.checkpoints else self.block)

    def working(self, tokens: int) -> int:
        """At work in the last block's feed-forward: the stream's gradient, the branch's, that of GELU's result.

        With activation checkpointing the block's own tensors as well. The gradient of a matrix counts, too.
        """
        width, entry = self.config.width, self.entry
        bytes_per_token = (self.residual + (entry if self.low else 0) + 4 * entry) * width
        return tokens * (bytes_per_token + (self.block if self.checkpoints else 0)) + 4 * _FP32 * width**2

    @property
    def block(self) -> int:
        """Saved by one block for each token."""
        return block_bytes(self.config, context=self.length, low=self.low, device=self.device, residual=self.residual)

    @property
    def embedding(self) -> int:
        """Bytes of the embedding's gradient in fp32: one comes from the head, one from the lookup."""
        return _FP32 * self.count.embedding

    @property
    def count(self) -> ParameterCount:
        return count_parameters(self.config)

    @property
    def model(self) -> int:
        """Bytes of the parameters in fp32."""
        return _FP32 * self.count.total

    @property
    def entry(self) -> int:
        """s: bytes of a number in matrix products."""
        return _BF16 if self.low else _FP32

    @property
    def residual(self) -> int:
        """r: bytes of a number in the residual stream."""
        return _BF16 if self.low and self.sharded else _FP32

    @property
    def end_bytes(self) -> int:
        """For each token outside the blocks: ids, targets, dropout's mask, final norm, hidden states and gradient."""
        mask = 0 if self.config.dropout == 0 else (_FP32 if self.device == "cpu" else 1)
        return 2 * 8 + (mask + 3 * self.residual) * self.config.width + 8

    @property
    def matrix_copies(self) -> int:
        """bf16 copies of the blocks' matrices, which autocast keeps until the forward pass is over."""
        return 0 if not self.low or self.sharded else _BF16 * self.count.matrices

    @property
    def late_copies(self) -> int:
        """Those that the graph holds then; activation checkpointing makes one block's again."""
        return self.matrix_copies // (self.config.layers if self.checkpoints else 1)

    def chunk(self, tokens: int) -> int:
        """What the loss has of a chunk's logits and their gradients."""
        rows, width = min(tokens, chunk_rows(self.config.head_rows, self.device)), self.config.width
        logits = rows * self.config.head_rows * (_FP32 + (_BF16 if self.low else 0))
        # Of a block of the weight's rows in bf16; from the second chunk on it is added up in fp32.
        added = _BF16 + (_FP32 if tokens > rows else 0)
        products = rows * self.entry + (min(BLOCK, self.config.head_rows) * added if self.low else 0)
        return logits + products * width

    @property
    def head_copy(self) -> int:
        """The loss's copy of the weight in bf16."""
        return _BF16 * self.count.embedding if self.low and not self.sharded else 0

    @property
    def gathered(self) -> int:
        """FSDP2: two blocks and the parameters outside them, gathered, and the gradients of one block and of those."""
        if not self.sharded:
            return 0
        block = self.count.matrices // self.config.layers
        outside = self.count.embedding + self.count.positions
        return self.entry * (2 * block + outside) + _FP32 * (block + outside)

    @property
    def step_temporaries(self) -> int:
        """Updates of Lion, Signum and NAdamW; Sophia's two in buckets, where they are not cut to the CPU's cache; for
        Muon, SOAP and Sophia-K products, or Sophia-K's rule for the embedding.
        """
        if self.optimizer in ("lion", "signum"):
            return self.model
        if self.optimizer == "nadamw":
            return 2 * self.model
        squared = self.config.width**2
        # Of the largest, 4 W · W, so many are turned together; the rest is by measurement.
        # Adam's rule by our own arithmetic; compiled loops on a CPU, if there are any, need none of it.
        others = (6 if self.sharded else 4) * self.count.embedding
        alike = min(self.config.layers, max(1, together(self.device) // (4 * squared)))
        products = {
            "muon": 4 * 4 * squared,  # a bf16 product and its operands, of the largest matrix
            "soap": 4 * _FP32 * max(self.count.embedding, 4 * squared),
            "sophia-k": _FP32 * max(others, (25 if self.sharded else 34 * alike) * squared),
        }
        if self.optimizer in products:
            return products[self.optimizer]
        if self.optimizer.startswith("sophia") and self.device != "cpu":
            largest = max(BUCKET, self.count.embedding)
            return 2 * _FP32 * min(largest, self.count.total)
        return 0
