"""`sophia compare --reuse`: a baseline's runs made for another study are not made again."""

import json
import shutil

import pytest

from sophia.study import lock
from sophia.study.ledger import Ledger
from tests.study import tiny
from tests.study.test_compare import data, quick, results, untimed, whole  # noqa: F401  (fixtures)
from tests.train.runs import sophia


def test_the_runs_of_the_baseline_are_taken(whole, tmp_path, data, quick, capsys):  # noqa: F811
    """A study of AdamW and Lion after one of AdamW and Sophia-G: only Lion runs."""
    other = whole[1]
    before = (other / "runs.jsonl").read_bytes()
    file = tiny.write_study(tmp_path, data, optimizers=("adamw", "lion"))
    assert sophia("compare", file, "--out", tmp_path / "out", "--reuse", other) == 0
    theirs = {key: run for key, run in untimed(Ledger(other)).items() if run.spec.optimizer == "adamw"}
    ours = untimed(Ledger(tmp_path / "out"))
    assert theirs
    assert all(ours[key] == run for key, run in theirs.items())
    assert f"{len(theirs)} runs taken from" in capsys.readouterr().out
    made = {run.spec.optimizer for key, run in ours.items() if key not in theirs}
    assert made == {"lion"}
    assert results(tmp_path / "out")["complete"] is True
    assert (other / "runs.jsonl").read_bytes() == before
    assert sophia("compare", file, "--out", tmp_path / "out", "--reuse", other) == 0
    assert "0 runs taken" in capsys.readouterr().out


def test_runs_that_are_wanted_later_are_taken_later(whole, tmp_path, data, quick, capsys):  # noqa: F811
    """A longer curve of AdamW has to be made before the plan asks for Sophia-G, whose runs are there already."""
    file = tiny.write_study(tmp_path, data, baseline_budgets=(0.5, 1.0, 2.0, 4.0))
    assert sophia("compare", file, "--out", tmp_path / "out", "--reuse", whole[1]) == 0
    theirs, ours = untimed(Ledger(whole[1])), untimed(Ledger(tmp_path / "out"))
    assert {run.spec.optimizer for key, run in ours.items() if key not in theirs} == {"adamw"}
    assert {run.spec.optimizer for key, run in ours.items() if key in theirs} == {"adamw", "sophia-g"}
    assert all(ours[key] == theirs[key] for key in ours.keys() & theirs.keys())
    assert "more runs taken that were made elsewhere" in capsys.readouterr().out
    assert lock.read(tmp_path / "out").tested


@pytest.mark.parametrize(
    ("race", "message"),
    [
        ({"warmup_fraction": 0.25}, "race.warmup_fraction is 0.1 and here 0.25: its runs cannot stand beside"),
        ({"eval_windows": 2}, "race.eval_windows is 4 and here 2"),
    ],
)
def test_other_rules(race, message, whole, tmp_path, data, quick, capsys):  # noqa: F811
    file = tiny.write_study(tmp_path, data, optimizers=("adamw", "lion"), **race)
    assert sophia("compare", file, "--out", tmp_path / "out", "--reuse", whole[1]) == 2
    said = capsys.readouterr()
    assert message in said.out + said.err
    assert not Ledger(tmp_path / "out").runs


def test_other_data_and_no_runs(whole, tmp_path, data, quick, capsys):  # noqa: F811
    other = tmp_path / "other"
    shutil.copytree(whole[1], other)
    held = json.loads((other / "lock.json").read_text())
    lock.write(other, lock.Lock(frozen=held["frozen"], data="0" * 64, committed=True, tested=True))
    file = tiny.write_study(tmp_path, data, optimizers=("adamw", "lion"))
    for folder, message in ((other, "a study of other data"), (tmp_path / "nowhere", "holds no finished run")):
        assert sophia("compare", file, "--out", tmp_path / "out", "--reuse", folder) == 2
        said = capsys.readouterr()
        assert message in (said.out + said.err).replace("\n", " ")
