"""`sophia compare` from its file to its report, in pieces, through kills, and what it refuses."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sophia import compare, report
from sophia.occupied import occupied
from sophia.study import lock, read, timing
from sophia.study.ledger import Ledger
from sophia.study.measured import Cost
from sophia.study.plan import plan
from tests.study import tiny
from tests.train import runs
from tests.train.runs import sophia


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture
def quick(monkeypatch):
    """Runs in this process, invented timings, no pictures."""
    monkeypatch.setattr(compare, "Pool", tiny.InProcess)
    monkeypatch.setattr(timing, "measure", _invented)
    monkeypatch.setattr(report, "write", lambda results, out: [])


def _invented(study, plan, place, report):
    return [
        Cost(
            optimizer=case.name,
            settings=case.spec.settings,
            tokens_per_step=case.spec.tokens_per_step,
            seconds_per_step=0.1,
            ratio=1.0,
            ratio_low=0.9,
            ratio_high=1.1,
            rounds=7,
            steps_per_round=10,
            refreshes_per_round=1 if case.spec.kind.startswith("sophia") else None,
            flops_per_step=1e6 + number,
            peak_memory_bytes=None,
        )
        for number, case in enumerate(timing.cases(study, plan))
    ]


def untimed(ledger):
    return {key: replace(run, seconds=0.0, date="") for key, run in ledger.runs.items()}


def results(out):
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """An undisturbed study: its file and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "Pool", tiny.InProcess)
        patch.setattr(timing, "measure", _invented)
        file = tiny.write_study(folder, data)
        assert sophia("compare", file, "--out", folder / "out") == 0
    return file, folder / "out"


def test_a_whole_study(whole):
    file, out = whole
    found = results(out)
    assert found["complete"] is True
    assert found["baseline"] == "adamw"
    assert set(found["optimizers"]) == {"adamw", "sophia-g"}
    ledger = Ledger(out)
    assert len(found["runs"]) == len(ledger.runs)
    finals = [run.val_loss for run in ledger.runs.values() if run.spec.optimizer == "adamw" and run.spec.seed > 0]
    assert found["optimizers"]["adamw"]["final_loss"]["mean"] < 6
    assert len(finals) == 2 * 3
    assert (out / "report.html").read_text(encoding="utf-8").count("<html") == 1
    assert list(out.glob("*.png"))
    assert (out / "study.toml").read_text() == file.read_text()
    assert not list((out / "work").glob("*"))
    locked = json.loads((out / lock.FILE).read_text())
    assert locked["tested"] is True


MATRICES = """
search = {others = ["curvature"]}
basis = "both"
nesterov = false
update_rms = 0.4

[[ablation]]
name = "gradients"
of = "sophia-k"
factors = "gradients"
exponent = 0.5
clip = false

[[ablation]]
name = "labels"
of = "sophia-k"
curvature_noise = "labels"
basis = "none"
"""


def test_a_study_of_sophia_k(tmp_path, data, quick, monkeypatch):
    """Its settings are keys like others, of an entry, an ablation and a search; its curvature is in the evidence."""
    monkeypatch.setitem(tiny.LR, "sophia-k", 0.24)  # about the best of ten steps, so that trials are left
    brief = {"tokens": 320, "baseline_budgets": (1.0, 2.0), "seeds": (1,), "trials": 6, "retrials": 1, "evaluations": 1}
    file = tiny.write_study(tmp_path, data, optimizers=("adamw", "sophia-k"), more=MATRICES, **brief)
    assert sophia("compare", file, "--out", tmp_path / "out") == 0
    found = results(tmp_path / "out")
    assert found["complete"] is True
    specs = [run.spec for run in Ledger(tmp_path / "out").runs.values()]
    tried = [dict(spec.settings) for spec in specs if spec.optimizer == "sophia-k"]
    assert {one["others"] for one in tried} == {"gradients", "curvature"}
    assert {(one["basis"], one["nesterov"], one["update_rms"]) for one in tried} == {
        ("both", False, 0.4),
        ("none", False, 0.4),
    }
    assert {(one.get("factors"), one.get("exponent")) for one in tried} == {(None, None), ("gradients", 0.5)}


def test_again_makes_no_run(whole, quick, capsys):
    file, out = whole
    (out / "work" / "taken-out-again").mkdir(parents=True)
    before = (out / "runs.jsonl").read_bytes()
    del tiny.InProcess.latest
    assert sophia("compare", file, "--out", out) == 0
    assert not hasattr(tiny.InProcess, "latest")
    assert (out / "runs.jsonl").read_bytes() == before
    assert not list((out / "work").glob("*"))


def test_in_pieces_it_is_the_same(whole, quick, tmp_path, capsys, monkeypatch):
    """Each piece ends after some runs, as --minutes does it."""
    file, out = whole
    seconds = itertools.count(step=10.0)
    monkeypatch.setattr("sophia.study.advance.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    counts = []
    for _ in range(20):
        assert sophia("compare", file, "--out", tmp_path / "out", "--minutes", "1") == 0
        counts.append(len(Ledger(tmp_path / "out").runs))
        assert results(tmp_path / "out")["complete"] == (counts[-1] == len(Ledger(out).runs))
        if results(tmp_path / "out")["complete"]:
            break
    assert len(counts) > 2
    assert counts == sorted(set(counts))
    said = capsys.readouterr().out
    assert f"{counts[0]} runs finished, about " in said
    assert "the same command goes on" in said
    assert untimed(Ledger(tmp_path / "out")) == untimed(Ledger(out))


def test_the_baseline_comes_first(whole):
    """All of its searches and budgets, before any other entry's first run."""
    _, out = whole
    names = [run.spec.optimizer for run in Ledger(out).runs.values()]
    searched = [run.spec for run in Ledger(out).runs.values() if run.spec.optimizer == "adamw" and run.spec.seed == 0]
    first = names.index("sophia-g")
    assert {spec.steps for spec in searched} == {10, 20, 40}
    assert all(spec.id in list(Ledger(out).runs)[:first] for spec in searched)


def test_another_entry_later_keeps_what_there_is(whole, quick, tmp_path, data):
    _, out = whole
    later = tmp_path / "out"
    later.mkdir()
    for name in ("runs.jsonl", "lock.json"):
        (later / name).write_bytes((out / name).read_bytes())
    more = tiny.write_study(tmp_path, data, more='[[optimizer]]\noptimizer = "lion"\nlr = 1e-3\n')
    assert sophia("compare", more, "--out", later) == 0
    assert (later / "runs.jsonl").read_bytes().startswith((out / "runs.jsonl").read_bytes())
    assert {run.spec.optimizer for run in Ledger(later).runs.values()} == {"adamw", "sophia-g", "lion"}


def test_a_study_without_a_search(quick, tmp_path, data):
    """No trial at all: nothing may be read from the first one."""
    file = tiny.write_study(tmp_path, data, trials=0, retrials=0)
    assert sophia("compare", file, "--out", tmp_path / "out") == 0
    found = results(tmp_path / "out")
    assert found["complete"] is True
    assert [run["role"] for run in found["runs"]] == ["final"] * len(found["runs"])
    assert "Untuned" in found["verdict"]


def test_json(whole, quick, capsys):
    file, out = whole
    assert sophia("compare", file, "--out", out, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["complete"] is True
    assert answer["verdict"] == results(out)["verdict"]
    assert answer["finished_runs"] == len(Ledger(out).runs)


def test_report_alone_changes_no_run(whole, quick, tmp_path, capsys):
    file, out = whole
    here = tmp_path / "out"
    here.mkdir()
    (here / "lock.json").write_bytes((out / "lock.json").read_bytes())
    content = (out / "runs.jsonl").read_bytes()
    (here / "runs.jsonl").write_bytes(content[: len(content) // 2])  # while another process is writing
    with occupied(here, f"the study in {here} is being advanced"):
        assert sophia("compare", file, "--out", here, "--report") == 0
    assert (here / "runs.jsonl").read_bytes() == content[: len(content) // 2]
    assert results(here)["complete"] is False
    assert sophia("compare", file, "--out", tmp_path / "none", "--report") == 2
    assert "holds no finished run to report" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def _refused(capsys, *words):
    assert sophia("compare", *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("sophia: ")
    assert said.count("\n") == 1
    return said


def test_what_is_refused(whole, quick, tmp_path, data, capsys):
    file, out = whole
    before = (out / "runs.jsonl").read_bytes()
    changed = tiny.write_study(tmp_path, data, tokens=1280)
    assert "race.tokens is 1280, but the study in" in _refused(capsys, changed, "--out", out)
    other = runs.write_data(tmp_path / "other", seed=3)
    assert "the data changed" in _refused(capsys, tiny.write_study(tmp_path, other), "--out", out)
    shard = tmp_path / "bent" / "train-00000.tokens"
    shutil.copytree(data, shard.parent)
    content = shard.read_bytes()
    shard.write_bytes(content[:-300] + bytes([content[-300] ^ 1]) + content[-299:])  # its manifest is as it was
    assert "train-00000.tokens is damaged" in _refused(capsys, tiny.write_study(tmp_path, shard.parent), "--out", out)
    assert "missing.toml does not exist" in _refused(capsys, tmp_path / "missing.toml")
    assert "workers is 0" in _refused(capsys, file, "--out", out, "--workers", 0)
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        assert "cannot be made a folder" in _refused(capsys, file, "--out", tmp_path / place)
    assert "minutes is 0" in _refused(capsys, file, "--out", out, "--minutes", 0)
    with occupied(out, f"the study in {out} is being advanced"):
        assert "is being advanced by process" in _refused(capsys, file, "--out", out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "0")
        assert "without torchrun" in _refused(capsys, file, "--out", out)
    assert (out / "runs.jsonl").read_bytes() == before


def test_a_run_that_cannot_be_made(quick, tmp_path, data, capsys):
    """Found out by the run itself; what ended before is kept."""
    more = '[[ablation]]\nname = "all rows"\nof = "sophia-g"\ncurvature_rows = 100\n'
    file = tiny.write_study(tmp_path, data, more=more)
    said = _refused(capsys, file, "--out", tmp_path / "out")
    assert "curvature_rows is 100" in said
    assert len(Ledger(tmp_path / "out").runs) > 10 or not (tmp_path / "out").exists()


def _start(file, out, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "sophia", "compare", file, "--out", out, "--workers", "2", *words]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def _children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(word) for word in path.read_text().split()]


def _is_worker(pid):
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _wait(ready, seconds=60.0):
    until = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.002)


def _count(out):
    path = out / "runs.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_kill_of_the_study_itself(whole, quick, tmp_path):
    """No orphans, nothing lost; the end is that of the undisturbed study, which had one worker."""
    file, undisturbed = whole
    out = tmp_path / "out"
    process = _start(file, out)
    _wait(lambda: _count(out) >= 3)
    workers = [pid for pid in _children(process) if _is_worker(pid)]
    assert len(workers) == 2
    process.kill()
    process.communicate()
    _wait(lambda: not any(map(_is_worker, workers)), 10.0)
    kept = (out / "runs.jsonl").read_bytes()
    whole_lines = kept[: kept.rfind(b"\n") + 1]
    assert sophia("compare", file, "--out", out) == 0
    assert (out / "runs.jsonl").read_bytes().startswith(whole_lines)
    assert untimed(Ledger(out)) == untimed(Ledger(undisturbed))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_the_timing(whole, quick, capsys, monkeypatch, number, code):
    file, out = whole
    monkeypatch.setattr(timing, "measure", lambda *_: os.kill(os.getpid(), number))
    before = signal.getsignal(signal.SIGTERM)
    assert sophia("compare", file, "--out", out) == code
    said = capsys.readouterr().out
    assert f"{number.name}: stopped; all runs are finished and kept, and the same command goes on with" in said
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"machine": {', '"mach": {', "it has no 'machine'"),
        ('"machine": {', '"machine": 5, "m": {', "machine is 5"),
        ('"ratio": 1.0', '"ratio": "x"', "ratio is 'x'"),
        ('"ratio": 1.0', '"ratio": null', "ratio is None"),
        ('"ratio": 1.0', '"ratio": 0', "ratio is 0"),
    ],
)
def test_a_damaged_timing(whole, quick, tmp_path, capsys, old, new, reason):
    """It was a traceback."""
    file, out = whole
    for name in ("lock.json", "runs.jsonl"):
        shutil.copy(out / name, tmp_path / name)
    study = read.read_study(file)
    costs = [asdict(cost) for cost in _invented(study, plan(study, Ledger(out).runs), None, None)]
    lines = [{**cost, "settings": dict(cost["settings"]), "kind": cost["optimizer"]} for cost in costs]
    content = json.dumps({"format": timing.FORMAT, "machine": {}, "costs": lines})
    (tmp_path / timing.FILE).write_text(content)
    assert sophia("compare", file, "--out", tmp_path, "--report") == 0
    assert old in content
    (tmp_path / timing.FILE).write_text(content.replace(old, new, 1))
    capsys.readouterr()
    said = _refused(capsys, file, "--out", tmp_path, "--report")
    assert f"timing.json is damaged ({reason}): delete it, and it is measured again" in said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_pause(whole, quick, tmp_path, capsys, monkeypatch, number, code):
    file, undisturbed = whole
    wait = tiny.InProcess.wait

    def interrupted(self, seconds):
        if len(Ledger(tmp_path / "out").runs) == 4:
            os.kill(os.getpid(), number)
        return wait(self, seconds)

    monkeypatch.setattr(tiny.InProcess, "wait", interrupted)
    assert sophia("compare", file, "--out", tmp_path / "out") == code
    said = capsys.readouterr().out
    assert f"{number.name}: stopped with 5 finished runs, which are kept; the same command goes on" in said
    assert sophia("compare", file, "--out", tmp_path / "out") == 0
    assert untimed(Ledger(tmp_path / "out")) == untimed(Ledger(undisturbed))
