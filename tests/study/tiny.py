"""The smallest studies that can be run: a model of one layer, a text of bytes."""

from sophia.config import MachineSettings, ModelSettings
from sophia.study.runs import RunSpec, settings
from sophia.study.settings import DataSettings, Entry, RaceSettings, Study

MODEL = ModelSettings(model="nano", layers=1, heads=2, width=16, context=8)
LR = {"adamw": 1e-2, "sophia-g": 3e-3, "lion": 1e-3, "muon": 1e-2, "sophia-h": 3e-3}


def study(folder=None, *, optimizers=("adamw", "sophia-g"), **race):
    """Two steps of 32 tokens would do; T is 20."""
    given = {
        "tokens": 640,
        "tokens_per_step": 32,
        "baseline_budgets": (0.5, 1.0, 2.0),
        "headline_budgets": (1.0,),
        "seeds": (1, 2),
        "trials": 3,
        "evaluations": 4,
        "eval_windows": 4,
        **race,
    }
    return Study(
        name="tiny",
        data=DataSettings(folder=folder, text="noise", sha256="0" * 64),
        model=MODEL,
        race=RaceSettings(**given),
        machine=MachineSettings(device="cpu"),
        optimizers=tuple(Entry(name=name, optimizer=name, lr=LR[name]) for name in optimizers),
    )


def spec(optimizer="adamw", *, steps=20, seed=1, kind=None, **values):
    values.setdefault("lr", LR.get(optimizer, 1e-3))
    return RunSpec(
        optimizer=optimizer,
        settings=settings(**values),
        tokens_per_step=32,
        steps=steps,
        seed=seed,
        kind=kind or optimizer,
    )
