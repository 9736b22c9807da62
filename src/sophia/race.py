"""A race: the same small GPT-2 trained by several optimizers, step by step in turn, on the same batches.

The runs share one process and alternate after every step, so whatever else the machine does slows them alike.
Each has a clock of its own that counts its training and, for Sophia, the curvature; validation counts for nobody.
"""

import copy
import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from sophia import SophiaG
from sophia.data.builtin import builtin_documents, fingerprint
from sophia.data.tokens import Tokens, batch, encode, split_documents, train_tokenizer, validation_batches
from sophia.model import GPT, GPTConfig
from sophia.schedule import warmup_cosine


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """What all runs of a race have in common."""

    steps: int = 500
    """Updates of each run."""
    seed: int = 0
    """Decides the initial weights and the order of the text."""
    batch_size: int = 16
    """Sequences in a step."""
    context: int = 128
    """Tokens in a sequence."""
    layers: int = 4
    """Transformer blocks of the model."""
    heads: int = 2
    """Attention heads in each block."""
    width: int = 128
    """Size of the model's residual stream."""
    vocab_size: int = 1024
    """Entries of the byte-pair encoding that is trained on the text."""
    text_bytes: int = 8_000_000
    """How much of the machine's own text to read."""
    validation_fraction: float = 0.05
    """Share of the documents that no run trains on."""
    validation_windows: int = 128
    """Sequences on which the validation loss is measured, always the same."""
    validation_interval: int = 25
    """Updates between two measurements of the validation loss; also one before the first and after the last."""
    warmup_fraction: float = 0.5
    """Share of the updates in which the learning rate climbs to its peak; then it follows a cosine to 0.05 of it. So
    short a run wants a long climb, by either optimizer: see docs/demo-sweep.md."""
    max_gradient_norm: float = 1.0
    """The gradient is scaled down to this norm when it is longer."""

    def __post_init__(self) -> None:
        """Refuse what cannot be run."""
        for name in ("steps", "batch_size", "validation_windows", "validation_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")
        if not 0.0 <= self.warmup_fraction < 1.0:
            raise ValueError(f"warmup_fraction is {self.warmup_fraction}; it must be at least 0 and below 1")

    @property
    def model(self) -> GPTConfig:
        """The shape of the model."""
        return GPTConfig(
            vocab_size=self.vocab_size,
            context=self.context,
            layers=self.layers,
            heads=self.heads,
            width=self.width,
        )

    @property
    def tokens_per_step(self) -> int:
        """Predictions that one update learns from."""
        return self.batch_size * self.context

    def lr_factor(self, step: int) -> float:
        """The schedule: a factor on the peak learning rate for the update after ``step`` earlier ones."""
        warmup_steps = int(self.warmup_fraction * self.steps)
        return warmup_cosine(step, total_steps=self.steps, warmup_steps=warmup_steps)


@dataclass(frozen=True, kw_only=True)
class AdamWRecipe:
    """How AdamW is set; the defaults are the best of docs/demo-sweep.md."""

    lr: float = 8e-3
    """Peak learning rate."""
    beta2: float = 0.95
    """Decay of the average of squared gradients."""
    beta1: float = 0.9
    """Decay of the average of gradients."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, times the learning rate."""

    name = "AdamW"

    def build(self, model: nn.Module) -> torch.optim.AdamW:
        """Make the optimizer, by torch's fastest path."""
        groups = parameter_groups(model, self.weight_decay)
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), fused=True)


@dataclass(frozen=True, kw_only=True)
class SophiaGRecipe:
    """How Sophia-G is set; the defaults are the best of docs/demo-sweep.md."""

    lr: float = 2e-3
    """Peak learning rate."""
    gamma: float = 0.5
    """Factor on the curvature; larger clips fewer coordinates."""
    beta1: float = 0.9
    """Decay of the average of gradients."""
    beta2: float = 0.99
    """Decay of the average of curvature estimates."""
    weight_decay: float = 0.2
    """Decoupled decay of matrices, times the learning rate."""
    curvature_rows: int = 8
    """Sequences of the batch from which a curvature estimate is made."""
    rows_per_chunk: int = 1
    """Sequences whose sampled gradients are summed before squaring; fewer give less noise."""
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of momentum and curvature."""

    name = "Sophia-G"

    def build(self, model: nn.Module) -> SophiaG:
        """Make the optimizer."""
        groups = parameter_groups(model, self.weight_decay)
        state_dtype = torch.bfloat16 if self.state_dtype == "bf16" else None
        betas = (self.beta1, self.beta2)
        return SophiaG(groups, lr=self.lr, betas=betas, gamma=self.gamma, state_dtype=state_dtype)

    def refresh(self, optimizer: SophiaG, model: nn.Module, inputs: Tensor) -> None:
        """Renew the curvature estimate when it is due; returns at once on the nine steps between."""
        chunks = torch.split(inputs[: self.curvature_rows], self.rows_per_chunk)
        optimizer.refresh_curvature([functools.partial(model, chunk) for chunk in chunks])


Recipe = AdamWRecipe | SophiaGRecipe


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices only: scales of LayerNorms and biases have nothing to gain from being small."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text of a race, ready to train on."""

    tokenizer: Tokenizer
    """Turns text into ids and back."""
    train: Tokens
    """Ids of the training documents, one after another."""
    validation: list[tuple[Tensor, Tensor]]
    """Inputs and targets, the same at every measurement."""
    documents: int
    """How many documents were read."""
    fingerprint: str
    """SHA-256 of the documents."""


def prepare_text(settings: RaceSettings) -> Text:
    """Read the machine's text, learn an encoding from the training part, and encode both parts.

    Raises:
        ValueError: The text is too little for the settings.
    """
    documents = builtin_documents(settings.text_bytes)
    train, validation = split_documents(documents, settings.validation_fraction)
    tokenizer = train_tokenizer(train, settings.vocab_size)
    return Text(
        tokenizer=tokenizer,
        train=encode(tokenizer, train),
        validation=validation_batches(
            encode(tokenizer, validation),
            windows=settings.validation_windows,
            batch_size=settings.batch_size,
            context=settings.context,
        ),
        documents=len(documents),
        fingerprint=fingerprint(documents),
    )


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One measurement of the validation loss."""

    step: int
    """Updates done."""
    seconds: float
    """The run's own clock."""
    loss: float
    """Mean cross-entropy of a token in nats."""


@dataclass(kw_only=True)
class Run:
    """One optimizer with its own copy of the model and its own clock."""

    recipe: Recipe
    model: GPT
    optimizer: torch.optim.Optimizer
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    """Training loss of every step."""
    validations: list[Validation] = field(default_factory=list)
    clip_fractions: list[float] = field(default_factory=list)
    """For Sophia: share of the coordinates clipped in the last update before each validation."""

    @property
    def name(self) -> str:
        """The optimizer's name."""
        return self.recipe.name

    @property
    def diverged(self) -> bool:
        """Whether the loss has left the numbers; such a run never comes back."""
        return bool(self.losses) and not math.isfinite(self.losses[-1])

    @property
    def final_loss(self) -> float:
        """The latest validation loss."""
        return self.validations[-1].loss

    def first_at_or_below(self, loss: float) -> Validation | None:
        """The first validation that reached ``loss``, or None."""
        return next((point for point in self.validations if point.loss <= loss), None)

    def train_step(self, inputs: Tensor, targets: Tensor, *, lr_factor: float, max_norm: float) -> None:
        """One update, on the run's clock: curvature when due, loss, gradient, step."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * lr_factor
        if isinstance(self.recipe, SophiaGRecipe):
            assert isinstance(self.optimizer, SophiaG)
            self.recipe.refresh(self.optimizer, self.model, inputs)
        loss = mean_loss(self.model, inputs, targets)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds += time.perf_counter() - start

    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Measure the validation loss, off the clock."""
        self.model.eval()
        with torch.no_grad():
            losses = [mean_loss(self.model, inputs, targets).item() for inputs, targets in batches]
        self.model.train()
        step = len(self.losses)
        loss = sum(losses) / len(losses)
        self.validations.append(Validation(step=step, seconds=self.seconds, loss=loss))
        if step and isinstance(self.optimizer, SophiaG):
            self.clip_fractions.append(float(self.optimizer.stats()["clip_fraction"]))


def mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over all positions: ids [batch, time] twice -> scalar, in nats."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def start_runs(settings: RaceSettings, recipes: Sequence[Recipe]) -> list[Run]:
    """Give each recipe the same initial weights; the global random generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = GPT(settings.model)
    runs = []
    for recipe in recipes:
        own = copy.deepcopy(model)
        runs.append(Run(recipe=recipe, model=own, optimizer=recipe.build(own)))
    return runs


def race(settings: RaceSettings, runs: Sequence[Run], text: Text) -> Iterator[int]:
    """Train all runs in turn and yield the number of updates done, from 0 to ``settings.steps``.

    The runs are validated before the first update, at every ``validation_interval`` and after the last. A run
    that diverges makes no more steps; when all have, the race ends.
    """
    for step in range(settings.steps + 1):
        running = [run for run in runs if not run.diverged]
        if not running:
            return
        if step % settings.validation_interval == 0 or step == settings.steps:
            for run in running:
                run.validate(text.validation)
        yield step
        if step == settings.steps:
            return
        inputs, targets = batch(
            text.train,
            seed=settings.seed,
            step=step,
            batch_size=settings.batch_size,
            context=settings.context,
        )
        for run in running:
            run.train_step(inputs, targets, lr_factor=settings.lr_factor(step), max_norm=settings.max_gradient_norm)
