"""docs/protocol.md: its example of a foreign optimizer runs, its commands and names exist."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from sophia import compare
from sophia.config import to_mapping
from sophia.data.shards import Dataset
from sophia.guards import Signals
from sophia.study import read
from sophia.study.curve import Curve
from sophia.study.one_run import run
from sophia.study.plan import plan
from sophia.study.settings import Ablation, Entry, RaceSettings
from tests.study import tiny
from tests.study.example import example_results
from tests.train.runs import write_data

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")


def block(language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A folder with the page's module, from which one starts."""
    (tmp_path / "sketch.py").write_text(block("python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("sketch", None)


def test_the_example_of_a_foreign_optimizer_runs(beside):
    data = write_data(beside / "data")
    study = tiny.study(data)
    content = {
        "name": "page",
        "data": {"folder": "data", "text": "noise", "sha256": "0" * 64},
        "model": to_mapping(study.model),
        "race": {k: list(v) if isinstance(v, tuple) else v for k, v in to_mapping(study.race).items()},
        "machine": to_mapping(study.machine),
        "optimizer": [{"optimizer": "adamw", "lr": 1e-2}, *tomllib.loads(block("toml"))["optimizer"]],
    }
    found = read.from_mapping(content, origin="page.toml", folder=beside)
    entry = found.entry("sketch")
    assert dict(entry.search) == {"weight_decay": (0.1, 0.3)}
    assert entry.kind == "sketch:Sketch+sketch:every_tenth_step"
    (first, *_) = plan(found, {}).wanted
    spec = dataclasses.replace(
        first, optimizer="sketch", kind=entry.kind, settings=(*entry.settings, ("lr", entry.lr)), seed=1
    )
    fingerprint = Dataset.open(data).fingerprint
    finished = run(found, spec, data=data, fingerprint=fingerprint, folder=beside / "run", signals=Signals())
    assert finished.curve[-1].step == spec.steps == 20
    assert finished.val_loss is not None
    assert finished.curve[0].val_loss is not None
    assert finished.val_loss < finished.curve[0].val_loss


def test_its_commands_have_these_flags():
    flags = set(re.findall(r"--([a-z]+)", PAGE))
    assert flags == {"out", "minutes", "report"}
    assert flags <= {field.name.replace("_", "-") for field in dataclasses.fields(compare.CompareSettings)}


def test_the_names_that_it_explains_are_in_the_results():
    results = example_results()
    one = results["optimizers"]["sophia-g"]
    names = {*results, *one, *one["speedup_tokens"], *results["runs"][0], *results["study"]}
    files = {"results.json", "runs.jsonl", "lock.json", "timing.json"}
    keys = {field.name for kind in (RaceSettings, Entry, Ablation) for field in dataclasses.fields(kind)}
    told = set(re.findall(r"`([a-z_.]+)`", PAGE)) - files - {"sketch.py", "every_tenth_step", "state_dict"}
    assert len(told) > 15
    assert told <= names | keys


def test_what_interpolation_adds_to_a_speedup():
    """Two figures of the section on limits."""

    def added(exponent):
        budgets = (0.5, 1.0, 2.0, 4.0)
        curve = Curve(
            tokens=tuple(int(1e6 * budget) for budget in budgets),
            losses=tuple(1.5 + 1.5 * budget**exponent for budget in budgets),
        )
        speedups = [0.5 + 0.01 * place for place in range(1, 350)]
        return [curve.tokens_for(1.5 + 1.5 * s**exponent)[0] / 1e6 / s - 1 for s in speedups]

    assert "adds at most 0.5 % to a speed-up (1.8 % for an exponent of −0.3)" in PAGE
    assert min(added(-0.08)) > -1e-9
    assert max(added(-0.08)) == pytest.approx(0.005, abs=5e-4)
    assert max(added(-0.3)) == pytest.approx(0.018, abs=5e-4)
