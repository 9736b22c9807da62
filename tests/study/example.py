"""A made-up study whose truth is known: optimizers that need 1/S of AdamW's tokens, and what the judge sees of them.

`Example` holds study, plan, runs and timings as plain values that a test may bend before it asks for the results;
`example_results()` is results.json of a whole study, for the report.
"""

import hashlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sophia.config import MachineSettings, ModelSettings
from sophia.study import results
from sophia.study.measured import Cost
from sophia.study.plan import AblationCell, Cell, Plan, Trial
from sophia.study.results import StudyContext
from sophia.study.runs import Evidence, FinishedRun, Point, RunSpec, Settings, settings
from sophia.study.settings import Ablation, Entry, RaceSettings, Study

TOKENS = 1_048_576
STEP = 2048

# What a token is worth, in AdamW's tokens; and what an update costs beside AdamW's.
WORTH = {"adamw": 1.0, "lion": 0.93, "signum": 0.8, "muon": 1.35, "soap": 1.3, "sophia-g": 1.06, "sophia-h": 1.0}
PRICE = {"adamw": 1.0, "lion": 0.99, "signum": 0.98, "muon": 1.12, "soap": 1.25, "sophia-g": 1.02, "sophia-h": 1.04}
RATE = {"adamw": 4e-3, "lion": 1e-3, "signum": 1e-3, "muon": 4e-3, "soap": 4e-3, "sophia-g": 2e-3, "sophia-h": 2e-3}
ABLATIONS = {
    "interval 1": {"curvature_interval": 1},
    "interval 100": {"curvature_interval": 100},
    "random signs": {"curvature_noise": "signs"},
    "gamma 1": {"gamma": 1.0},
}
_NOISE = 0.004


def loss_of(spec: RunSpec, worth: Mapping[str, float] = WORTH) -> float:
    """1.6 + 1.5 x^-0.15 nats, x the budget in AdamW's T, with a bowl in log lr and the luck of seed and run."""
    name, chosen = spec.optimizer, dict(spec.settings)
    lr = float(str(chosen["lr"]))
    luck = 2 * random.Random(f"{spec.seed}").gauss(0, _NOISE) + random.Random(spec.id).gauss(0, _NOISE)
    away = math.log(lr / RATE[name])
    if away > 2.0:
        return math.inf
    changed = {1: -0.003, 100: 0.02}.get(int(str(chosen.get("curvature_interval", 10))), 0.0)
    batch = 0.03 * math.log2(spec.tokens_per_step / STEP) ** 2
    return 1.6 + 1.5 * (spec.tokens * worth[name] / TOKENS) ** -0.15 + 0.03 * away**2 + changed + batch + luck


def study_of(**race: Any) -> Study:
    """Seven optimizers, six seeds for AdamW and Sophia-G, three for the others."""
    wanted: dict[str, Any] = {
        "tokens": TOKENS,
        "tokens_per_step": STEP,
        "headline": "sophia-g",
        "headline_seeds": (1, 2, 3, 4, 5, 6),
        "other_batches": (STEP // 2, 2 * STEP),
        "trials": 5,
        **race,
    }
    return Study(
        name="example",
        about="Made-up numbers that show what a report looks like.",
        model=ModelSettings(model="nano"),
        race=RaceSettings(**wanted),
        machine=MachineSettings(device="cpu"),
        optimizers=tuple(Entry(name=name, optimizer=name, lr=RATE[name]) for name in WORTH),
        ablations=tuple(
            Ablation(name=name, of="sophia-g", settings=settings(**changed), lr_factors=(0.5, 1.0, 2.0)[: 3 * (k < 2)])
            for k, (name, changed) in enumerate(ABLATIONS.items())
        ),
    )


CONTEXT = StudyContext(
    file='name = "example"\n\n[race]\ntokens = 1048576\n',
    file_sha256=hashlib.sha256(b"example").hexdigest(),
    committed=True,
    fingerprint=hashlib.sha256(b"data").hexdigest(),
    text="made-up text",
    text_sha256="",
    machine={"cpu": "a made-up processor", "cores": 2, "threads": 1, "gpu": None, "torch": "2.13.0", "python": "3.11"},
    parameters=1_234_560,
    vocab_size=1024,
    context=128,
)


@dataclass
class Example:
    """A study with everything that has run; a test may change any of it."""

    study: Study = field(default_factory=study_of)
    worth: Mapping[str, float] = field(default_factory=lambda: WORTH)
    loss: Callable[[RunSpec, Mapping[str, float]], float] = loss_of
    context: StudyContext = CONTEXT

    def __post_init__(self) -> None:
        self.finished: dict[str, FinishedRun] = {}
        cells = [cell for entry in self._entries() for cell in self._cells(entry)]
        ablations = [self._ablation(one, cells) for one in self.study.ablations]
        self.plan = Plan(cells=tuple(cells), ablations=tuple(ablations), wanted=(), steps_left=0, done=True)
        self.costs = self._costs()

    def results(self) -> dict[str, Any]:
        """results.json."""
        return results.build(self.study, self.plan, self.finished, self.costs, self.context)

    def bend(self, spec: RunSpec, **changes: Any) -> None:
        """Change what a run found, or with evidence_… what it saw."""
        run = self.finished[spec.id]
        seen = {name.removeprefix("evidence_"): v for name, v in changes.items() if name.startswith("evidence_")}
        rest = {name: v for name, v in changes.items() if not name.startswith("evidence_")}
        if seen:
            assert run.evidence is not None
            rest["evidence"] = replace(run.evidence, **seen)
        self.finished[spec.id] = replace(run, **rest)

    def cell(self, name: str, share: float = 1.0, tokens_per_step: int | None = None) -> Cell:
        """The cell of an entry at a share of T."""
        at = (name, int(share * self.study.race.tokens), tokens_per_step or self.study.race.tokens_per_step)
        (found,) = [c for c in self.plan.cells if (c.optimizer, c.steps * c.tokens_per_step, c.tokens_per_step) == at]
        return found

    def put(self, cell: Cell, **changes: Any) -> None:
        """Change a cell of the plan."""
        cells = tuple(replace(one, **changes) if one is cell else one for one in self.plan.cells)
        self.plan = replace(self.plan, cells=cells)

    def _entries(self) -> list[Entry]:
        return sorted(self.study.optimizers, key=lambda entry: entry.name != self.study.race.baseline)

    def _cells(self, entry: Entry) -> list[Cell]:
        race = self.study.race
        shares: tuple[float, ...] = (1.0,)
        if entry.name == race.baseline:
            shares = (1.0, *(share for share in race.baseline_budgets if share != 1.0))
        elif entry.name == race.headline:
            shares = (1.0, *(share for share in race.headline_budgets if share != 1.0))
        both = entry.name in (race.baseline, race.headline)
        first = [self._cell(entry, share, race.tokens_per_step) for share in shares]
        return first + [self._cell(entry, 1.0, size) for size in race.other_batches if both]

    def _cell(self, entry: Entry, share: float, size: int) -> Cell:
        race = self.study.race
        first = share == 1.0 and size == race.tokens_per_step
        count = race.trials if first else race.retrials
        steps = int(share * race.tokens) // size
        rates = [entry.lr * race.factor ** (place - count // 2) for place in range(count)]
        trials = []
        for number, lr in enumerate(rates):
            spec = self._spec(entry, settings(lr=lr, **dict(entry.settings)), size, steps, race.search_seed)
            why = "grid" if abs(number - count // 2) < 2 else "refine"
            trials.append(Trial(spec=spec, loss=self._run(spec).val_loss, finished=True, why=why))
        best = settings(lr=entry.lr, **dict(entry.settings))
        if trials:
            best = min(trials, key=lambda trial: math.inf if trial.loss is None else trial.loss).spec.settings
        many = entry.name == race.headline or (entry.name == race.baseline and share <= 1.0)
        seeds = (race.headline_seeds or race.seeds) if many else race.seeds
        finals = tuple(self._spec(entry, best, size, steps, seed) for seed in seeds)
        for spec in finals:
            self._run(spec)
        return Cell(
            optimizer=entry.name,
            steps=steps,
            tokens_per_step=size,
            trials=tuple(trials),
            best=best,
            edges=(),
            finals=finals,
        )

    def _ablation(self, one: Ablation, cells: list[Cell]) -> AblationCell:
        race = self.study.race
        entry = next(entry for entry in self.study.optimizers if entry.name == one.of)
        of = next(cell for cell in cells if cell.optimizer == one.of)
        assert of.best is not None
        steps = race.tokens // race.tokens_per_step

        def spec(factor: float, seed: int) -> RunSpec:
            base = dict(of.best or ())
            base["lr"] = float(str(base["lr"])) * factor
            return self._spec(entry, settings(**{**base, **dict(one.settings)}), race.tokens_per_step, steps, seed)

        trials = []
        for factor in one.lr_factors:
            tried = spec(factor, race.search_seed)
            trials.append(Trial(spec=tried, loss=self._run(tried).val_loss, finished=True, why="grid"))
        factor = 1.0
        if trials:
            scores = [math.inf if trial.loss is None else trial.loss for trial in trials]
            factor = one.lr_factors[scores.index(min(scores))]
        finals = tuple(spec(factor, seed) for seed in race.seeds)
        for wanted in finals:
            self._run(wanted)
        return AblationCell(name=one.name, of=one.of, trials=tuple(trials), best=finals[0].settings, finals=finals)

    def _spec(self, entry: Entry, chosen: Settings, size: int, steps: int, seed: int) -> RunSpec:
        return RunSpec(
            optimizer=entry.name,
            settings=chosen,
            tokens_per_step=size,
            steps=steps,
            seed=seed,
            kind=entry.optimizer,
        )

    def _run(self, spec: RunSpec) -> FinishedRun:
        loss = self.loss(spec, self.worth)
        diverged = math.isinf(loss)
        parts = self.study.race.evaluations
        curve = []
        for part in range(parts + 1):
            step = round(spec.steps * part / parts)
            value = loss + 4.5 * (1 - part / parts) ** 3 if not diverged else None
            clipped = 0.9 - 0.5 * part / parts if spec.optimizer.startswith("sophia") else None
            tokens = step * spec.tokens_per_step
            curve.append(Point(step=step, tokens=tokens, val_loss=value, loss=value, clip_fraction=clipped))
        run = FinishedRun(
            spec=spec,
            val_loss=None if diverged else loss,
            curve=tuple(curve),
            seconds=0.05 * spec.steps * PRICE[spec.optimizer],
            evidence=None if diverged else self._evidence(spec),
            date="2026-11-22",
        )
        self.finished[spec.id] = run
        return run

    def _evidence(self, spec: RunSpec) -> Evidence:
        interval = int(str(dict(spec.settings).get("curvature_interval", 10)))
        return Evidence(
            weights=_digest("weights", spec.seed),
            batches=_digest("batches", spec.seed, spec.tokens_per_step, spec.steps),
            validation=_digest("validation"),
            last_lr_factor=self.study.race.final_lr_fraction,
            refreshes=math.ceil(spec.steps / interval) if spec.optimizer.startswith("sophia") else None,
            conditions={
                "device": "cpu",
                "precision": "float32",
                "compile": False,
                "threads": 1,
                "torch": "2.13.0",
                "sophia": "0.4.0",
            },
        )

    def _costs(self) -> list[Cost]:
        race = self.study.race
        costs = [
            self._cost(cell.optimizer, cell.optimizer, cell.best, cell.tokens_per_step)
            for cell in self.plan.cells
            if cell.steps * cell.tokens_per_step == race.tokens and cell.best is not None
        ]
        for one in self.plan.ablations:
            assert one.best is not None
            if one.name == "gamma 1":  # costs what its entry costs
                continue
            costs.append(self._cost(one.name, one.of, one.best, race.tokens_per_step))
        return costs

    def _cost(self, name: str, kind: str, chosen: Settings, size: int) -> Cost:
        sophia = kind.startswith("sophia")
        interval = int(str(dict(chosen).get("curvature_interval", 10)))
        ratio = PRICE[kind] * (1 + (0.2 / interval - 0.02 if sophia else 0.0))
        baseline = kind == self.study.race.baseline
        return Cost(
            optimizer=name,
            settings=chosen,
            tokens_per_step=size,
            seconds_per_step=0.05 * ratio * size / STEP,
            ratio=ratio,
            ratio_low=ratio if baseline else 0.98 * ratio,
            ratio_high=ratio if baseline else 1.02 * ratio,
            rounds=8,
            steps_per_round=interval,
            refreshes_per_round=1 if sophia else None,
            flops_per_step=1.6e10 * size / STEP * (1 + (0.06 / interval if sophia else 0.0)),
            peak_memory_bytes=180_000_000 + 5_000_000 * len(name),
            # A machine that is now slow, now fast, for all alike.
            seconds=tuple(0.05 * ratio * size / STEP * pace for pace in (1.0, 1.1, 0.95, 1.3, 1.0, 0.9, 1.2, 1.0)),
        )


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def example_results() -> dict[str, Any]:
    """results.json of the whole example."""
    return Example().results()
