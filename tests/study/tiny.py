"""The smallest studies that can be run: a model of one layer, a text of bytes."""

import shutil

from sophia.config import MachineSettings, ModelSettings
from sophia.guards import Signals
from sophia.study import one_run
from sophia.study.runs import RunSpec, settings
from sophia.study.settings import DataSettings, Entry, RaceSettings, Study
from sophia.study.worker import Failed, Finished

MODEL = ModelSettings(model="nano", layers=1, heads=2, width=16, context=8)
LR = {"adamw": 1e-2, "sophia-g": 3e-3, "lion": 1e-3, "muon": 1e-2, "sophia-h": 3e-3, "sophia-k": 3e-2}


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


def write_study(folder, data, *, optimizers=("adamw", "sophia-g"), more="", **race):
    """The file of such a study, beside which its data lies."""
    wanted = {**vars(study(data, **race).race), "headline": optimizers[-1], "retrials": 2, **race}
    lines = [
        'name = "tiny"',
        "[data]",
        f'folder = "{data}"',
        'text = "noise"',
        f'sha256 = "{"0" * 64}"',
        "[model]",
        *(f"{key} = {value!r}".replace("'", '"') for key, value in vars(MODEL).items() if key in _SHAPE),
        "[machine]",
        'device = "cpu"',
        "[race]",
        *(f"{key} = {_written(value)}" for key, value in wanted.items()),
    ]
    for name in optimizers:
        lines += ["[[optimizer]]", f'optimizer = "{name}"', f"lr = {LR[name]}"]
    path = folder / "study.toml"
    path.write_text("\n".join([*lines, more]) + "\n", encoding="utf-8")
    return path


_SHAPE = ("model", "layers", "heads", "width", "context")


def _written(value):
    return f'"{value}"' if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)


class InProcess:
    """A pool of two workers, both of which are this process: at each wait one run of those begun is made."""

    def __init__(self, job, *, workers=1, gpus=(), note=print):
        self.job, self.running = job, []
        InProcess.latest = self

    @property
    def idle(self):
        return 2 - len(self.running)

    def start(self, spec):
        self.running.append(spec)

    def discard(self, spec):
        shutil.rmtree(self.job.work / spec.id, ignore_errors=True)

    def wait(self, seconds):
        spec = self.running.pop()
        job = self.job
        folder = job.work / spec.id
        try:
            run = one_run.run(
                job.study, spec, data=job.data, fingerprint=job.fingerprint, folder=folder, signals=Signals()
            )
        except ValueError as problem:
            return [Failed(spec, str(problem))]
        return [Finished(run)]

    def stop(self):
        return []
