"""A study: which optimizers race on which model, text, batch and budgets, and by which rule each is searched."""

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

from sophia.config import MachineSettings, ModelSettings
from sophia.study.runs import Settings, Value


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The text."""

    folder: Path | None = None
    """Folder that sophia prepare wrote; a relative one is looked for beside the study file. None makes data from
    `builtin` text below the study's output folder."""
    tokenizer: str = "bpe:1024"
    """For builtin text: its tokenizer, as sophia prepare takes it."""
    text: str = ""
    """Where the text comes from and under which licence, for the report; needed with a folder."""
    sha256: str = ""
    """Of the text, for the report; needed with a folder."""


@dataclass(frozen=True, kw_only=True)
class RaceSettings:
    """What is equal for all runs, and the rule by which each optimizer is searched."""

    tokens: int
    """The budget T, in predictions. Every budget is a whole number of steps at every batch size."""
    tokens_per_step: int
    """Predictions in an update, equal for all."""
    other_batches: tuple[int, ...] = ()
    """Further values of tokens_per_step, for the row with each optimizer at its best batch; the headline pair only."""
    baseline: str = "adamw"
    """The entry that the others are measured against."""
    headline: str = ""
    """The entry that the verdict is about; empty: the report has no headline."""
    baseline_budgets: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Budgets of the baseline, in units of T; each is a run with a whole schedule of its own."""
    headline_budgets: tuple[float, ...] = (0.5, 1.0)
    """Budgets of the headline entry; 0.5 is the paper's own test against the baseline at 1."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the final runs of every optimizer: initial weights and data order."""
    headline_seeds: tuple[int, ...] = ()
    """Seeds of the headline entry and the baseline at budgets up to T; empty: as `seeds`, which must be among them."""
    search_seed: int = 0
    """Seed of the search; not among the final ones, so that no optimizer is judged by the luck it was chosen for."""
    search_budget: float = 1.0
    """Budget of the searches, in units of T: 0.5 halves what they cost, and the settings found so are those of T."""
    trials: int = 8
    """Runs of each optimizer's search, the same number for all; 0: none, all run as the file has them, and
    the report calls them untuned."""
    retrials: int = 3
    """Learning rates tried at every other budget and batch, around the best at T; more where the best is on the
    edge; 0: none, that of T holds."""
    factor: float = 2.0
    """Ratio of neighbouring learning rates; the search refines by its root."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_fraction: float = 0.1
    """Share of a run's updates in which the learning rate climbs, at every budget."""
    final_lr_fraction: float = 0.05
    """The last learning rate, as a fraction of the peak."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm when it is longer."""
    evaluations: int = 10
    """Points of a run's curve after its start, evenly spaced, the last at its end."""
    eval_windows: int = 256
    """Sequences of the validation split that are evaluated, always the same."""

    @property
    def batches(self) -> tuple[int, ...]:
        """All values of tokens_per_step, the common one first."""
        return (self.tokens_per_step, *self.other_batches)

    @property
    def paired_seeds(self) -> tuple[int, ...]:
        """Seeds of the headline entry and of the baseline at budgets up to T, those of all entries first."""
        return self.seeds + tuple(seed for seed in self.headline_seeds if seed not in self.seeds)

    def exact_steps(self, budget: float, tokens_per_step: int) -> Fraction:
        """Updates of a run: the budget is in units of T, and 0.1 means a tenth, not the binary number nearest to it."""
        return self.tokens * Fraction(repr(budget)) / tokens_per_step

    def steps(self, budget: float, tokens_per_step: int) -> int:
        """Updates of a run, which the study file makes a whole number."""
        steps = self.exact_steps(budget, tokens_per_step)
        assert steps.denominator == 1, (budget, tokens_per_step)
        return steps.numerator


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One optimizer in the race."""

    name: str
    """What tables and plots call it."""
    optimizer: str
    """A name that sophia train knows, or package.module:Class of a torch.optim.Optimizer."""
    hook: str = ""
    """package.module:function, called before the gradients of every update: see `sophia.foreign`."""
    lr: float
    """The peak learning rate that its search begins with."""
    settings: Settings = ()
    """Other settings, held where the search does not change them."""
    search: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    """Settings that the search tries beside the learning rate, with the values it may take, in order."""

    @property
    def kind(self) -> str:
        """The optimizer, with the hook behind a plus sign: what runs carry as `RunSpec.kind`."""
        return f"{self.optimizer}+{self.hook}" if self.hook else self.optimizer


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """An entry with some settings changed, at the best settings of that entry: all seeds, budget T."""

    name: str
    """What the table calls it."""
    of: str
    """The entry."""
    settings: Settings
    """What is different."""
    lr_factors: tuple[float, ...] = ()
    """Factors on the entry's best learning rate, tried with the search's seed; empty: the learning rate is left."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """All of it."""

    name: str
    """Short, for file names and titles."""
    about: str = ""
    """A sentence for the report."""
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    race: RaceSettings
    machine: MachineSettings = field(default_factory=MachineSettings)
    optimizers: tuple[Entry, ...]
    """In the order of tables; the baseline's search comes first whatever its place."""
    ablations: tuple[Ablation, ...] = ()
    """Run last."""

    def entry(self, name: str) -> Entry:
        """The optimizer of this name, which there is."""
        return next(one for one in self.optimizers if one.name == name)
