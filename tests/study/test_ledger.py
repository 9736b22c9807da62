"""The ledger survives kills, and says what is wrong with a file that somebody has edited."""

import errno
import json
import math
import os

import pytest

from sophia.study.ledger import FILE, Ledger
from sophia.study.runs import Evidence, FinishedRun, Point
from tests.study import tiny


def finished(seed=1, *, loss=1.25, **values):
    curve = (Point(step=0, tokens=0, val_loss=5.0), Point(step=20, tokens=640, val_loss=loss, clip_fraction=0.5))
    evidence = Evidence(
        weights="w", batches="b", validation="v", last_lr_factor=0.05, refreshes=2, conditions={"device": "cpu"}
    )
    return FinishedRun(
        spec=tiny.spec("sophia-g", seed=seed, **values),
        val_loss=loss,
        curve=curve,
        seconds=1 / 3,
        evidence=evidence,
        date="2026-01-01",
    )


def filled(folder, count=3):
    ledger = Ledger(folder)
    for seed in range(count):
        ledger.append(finished(seed))
    return folder / FILE


def test_runs_come_back_as_they_were(tmp_path):
    runs = [
        finished(1, decay_by_name=("tokens.*=0", "head.*=0.1"), lr=0.1 + 0.2, bias_correction=True),
        finished(2, curvature_interval=5, gamma="auto"),
        FinishedRun(spec=tiny.spec(seed=3), val_loss=None, curve=(), seconds=0.0, evidence=None, date="2026-01-01"),
    ]
    ledger = Ledger(tmp_path)
    for run in runs:
        ledger.append(run)
    again = Ledger(tmp_path)
    assert list(again.runs.values()) == runs
    assert list(again.runs) == [run.spec.id for run in runs]
    assert len((tmp_path / FILE).read_text().splitlines()) == 3


def test_no_nan_is_written(tmp_path):
    Ledger(tmp_path).append(finished(loss=math.nan))
    text = (tmp_path / FILE).read_text()
    json.loads(text, parse_constant=pytest.fail)
    (run,) = Ledger(tmp_path).runs.values()
    assert run.val_loss is None
    assert run.curve[1].val_loss is None


@pytest.mark.parametrize("kept", [1, 40, -2, -1])
def test_a_half_written_last_line_is_cut_off(tmp_path, kept):
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:kept])
    notes = []
    ledger = Ledger(tmp_path, note=notes.append)
    assert [run.spec.seed for run in ledger.runs.values()] == [0, 1]
    assert path.read_bytes() == b"".join(lines[:2])
    assert len(notes) == 1
    assert "half written" in notes[0]
    ledger.append(finished(2))
    assert path.read_bytes() == b"".join(lines)


def test_a_reader_beside_the_study_leaves_it_alone(tmp_path):
    path = filled(tmp_path)
    content = path.read_bytes()[:-5]
    path.write_bytes(content)
    assert len(Ledger(tmp_path, mend=False).runs) == 2
    assert path.read_bytes() == content


def _changed(line, **changes):
    record = json.loads(line)
    record.update(changes)
    return json.dumps(record).encode() + b"\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda line: line[:50] + b"\n", "line 2 is not a finished run"),
        (lambda line: b"\n", "line 2"),
        (lambda line: b"[]\n", "line 2"),
        (lambda line: _changed(line, format=2), "its format is 2, and this version of sophia reads 1"),
        (lambda line: _changed(line, seed=7), "its settings are those of"),
        (lambda line: _changed(line, settings={"lr": 1.0}), "its settings are those of"),
        (lambda line: _changed(line, kind="lion"), "its settings are those of"),
        (lambda line: _changed(line, steps=20.0), "steps is 20.0"),
        (lambda line: _changed(line, evidence={"weights": 1}), "line 2"),
        (lambda line: _changed(line, curve=[{"stop": 1}]), "line 2"),
        (lambda line: line.replace(b'"val_loss": 1.25, "seconds"', b'"val_loss": NaN, "seconds"'), "val_loss is nan"),
        (lambda line: line.replace(b'"seconds"', b'"minutes"'), "it has no 'seconds'"),
    ],
)
def test_a_broken_line_is_named_with_the_remedy(tmp_path, change, reason):
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = change(lines[1])
    content = b"".join(lines)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="delete the line") as error:
        Ledger(tmp_path)
    assert reason in str(error.value)
    assert str(path) in str(error.value)
    assert path.read_bytes() == content


def test_a_run_that_stands_there_twice(tmp_path):
    path = filled(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[0]]))
    with pytest.raises(ValueError, match=r"line 4 is a second run .*: delete one of the two lines"):
        Ledger(tmp_path)


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = filled(tmp_path)
    content = path.read_bytes()
    write = os.write

    def full(handle, data):
        write(handle, data[:30])
        raise OSError(errno.ENOSPC, "No space left on device")

    ledger = Ledger(tmp_path)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left") as error:
        ledger.append(finished(9))
    monkeypatch.undo()
    assert error.value.filename == str(path)
    assert path.read_bytes() == content
    ledger.append(finished(9))
    assert len(Ledger(tmp_path).runs) == 4
