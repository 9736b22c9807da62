"""One place in a study, an optimizer at a budget and a batch: the runs that it asks for and how many are left."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from sophia.study.candidates import Found
from sophia.study.runs import FinishedRun, RunSpec, Settings


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a search."""

    spec: RunSpec
    """What was run, or is to be."""
    loss: float | None
    """Its validation loss; None: diverged, or not run yet (see `finished`)."""
    finished: bool
    """Whether it has run."""
    why: str
    """The rule that asked for it: "grid", "edge", the name of a setting, or "refine"."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """What all runs there have in common."""

    name: str
    """Of the entry."""
    kind: str
    """What the name stands for: `RunSpec.kind`."""
    steps: int
    """Updates of each run that counts."""
    trial_steps: int
    """Updates of each trial."""
    tokens_per_step: int
    """Predictions in an update."""
    search_seed: int
    """Of the trials."""
    finished: Mapping[str, FinishedRun]
    """All finished runs of the study, by `RunSpec.id`."""

    def spec(self, settings: Settings, seed: int) -> RunSpec:
        """A run there that counts."""
        return self._run(settings, seed, self.steps)

    def trial(self, settings: Settings) -> RunSpec:
        """A run of the search there."""
        return self._run(settings, self.search_seed, self.trial_steps)

    def _run(self, settings: Settings, seed: int, steps: int) -> RunSpec:
        return RunSpec(
            optimizer=self.name,
            settings=settings,
            tokens_per_step=self.tokens_per_step,
            steps=steps,
            seed=seed,
            kind=self.kind,
        )

    def loss(self, settings: Settings) -> float | None:
        """Of the trial with these settings: infinite where it diverged, None where it has not run."""
        run = self.finished.get(self.trial(settings).id)
        return None if run is None else run.score


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place with what its search has found, and the runs that count."""

    place: Place
    """Where."""
    seeds: tuple[int, ...]
    """Of the runs that count."""
    found: Found | None
    """None as long as it is not known where the search begins."""
    expected: int
    """Runs that the search takes, extensions apart."""
    main: bool = False
    """Whether it is the entry's search at budget T."""
    lost: bool = False
    """Whether the search never begins, because every run diverged where it would begin from."""

    @property
    def searched(self) -> bool:
        """Whether nothing of the search is left."""
        return self.lost or (self.found is not None and self.found.done)

    @property
    def best(self) -> Settings | None:
        """The best settings of a finished search."""
        return None if self.found is None else self.found.best

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """The runs of the search, those among them that are wanted now."""
        trials = []
        for one in self.found.candidates if self.found is not None else ():
            spec = self.place.trial(one.settings)
            run = self.place.finished.get(spec.id)
            loss = None if run is None else run.val_loss
            trials.append(Trial(spec=spec, loss=loss, finished=run is not None, why=one.why))
        return tuple(trials)

    @cached_property
    def finals(self) -> tuple[RunSpec, ...]:
        """The runs that count, at the best settings."""
        return () if self.best is None else tuple(self.place.spec(self.best, seed) for seed in self.seeds)

    @property
    def steps_left(self) -> int:
        """Updates until this place is done, those of runs that are not known yet estimated."""
        if self.searched:
            return self.place.steps * sum(spec.id not in self.place.finished for spec in self.finals)
        done = sum(trial.finished for trial in self.trials)
        trials = max(self.expected, len(self.trials)) - done
        return self.place.trial_steps * trials + self.place.steps * len(self.seeds)

    def wanted(
        self, *, search: tuple[int, ...], finals: tuple[int, ...], rank: int = 0
    ) -> list[tuple[tuple[int, ...], RunSpec]]:
        """Runs that can start now, with their urgency: least first.

        Trials follow their number in the search and final runs their seed, so that places of equal urgency advance side
        by side.

        Args:
            search: How urgent trials are.
            finals: How urgent final runs are, which are longest first.
            rank: Decides between equals.
        """
        found: list[tuple[tuple[int, ...], RunSpec]] = []
        for number, trial in enumerate(self.trials):
            if not trial.finished:
                found.append(((*search, number, rank), trial.spec))
        for number, spec in enumerate(self.finals):
            if spec.id not in self.place.finished:
                found.append(((*finals, number, -self.place.steps, rank), spec))
        return found
