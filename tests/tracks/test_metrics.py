"""`metrics.jsonl`: whole lines, and after a resume those of a run that never stopped."""

import errno
import itertools
import json
import math
import multiprocessing
import os
import signal
import time

import pytest

from sophia.metrics import Metrics, read_metrics


def training(step, **more):
    return {"step": step, "tokens": 64 * step, "loss": 5 - step / 7, "lr": 1e-3, "grad_norm": 0.1 * step, **more}


def evaluation(step):
    return {"step": step, "tokens": 64 * step, "val_loss": 5 - step / 8, "elapsed_seconds": float(step)}


def text(folder):
    return (folder / "metrics.jsonl").read_text(encoding="utf-8")


def write(folder, records, *, resume_step=None):
    with Metrics(folder, resume_step=resume_step) as metrics:
        for record in records:
            metrics.write(record)
    return text(folder)


def test_what_was_written_is_read(tmp_path):
    records = [evaluation(0), training(1), {"step": 1, "event": "spike", "loss": 7.25}, training(2), evaluation(2)]
    lines = write(tmp_path, records).splitlines()
    assert [json.loads(line) for line in lines] == records  # floats bit for bit
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found.training == [records[1], records[3]]
    assert found.evaluations == [records[0], records[4]]
    assert found.events == [records[2]]


def test_numbers_that_are_not_finite_are_null_and_read_as_nan(tmp_path):
    record = training(1, grad_norm=math.inf, clip_fraction=None, loss=math.nan, tokens_per_second=-math.inf)
    line = json.loads(write(tmp_path, [record]), parse_constant=pytest.fail)
    assert {key for key, value in line.items() if value is None} == {
        "grad_norm",
        "clip_fraction",
        "loss",
        "tokens_per_second",
    }
    found = read_metrics(tmp_path / "metrics.jsonl").training[0]
    assert all(math.isnan(found[key]) for key in ("grad_norm", "clip_fraction", "loss"))
    assert found["step"] == 1


def test_every_line_is_on_its_way_when_write_returns(tmp_path):
    with Metrics(tmp_path, resume_step=None) as metrics:
        for step in range(1, 4):
            metrics.write(training(step))
            assert len(read_metrics(metrics.path).training) == step


@pytest.mark.parametrize("stopped_at", [0, 3, 4, 8])
@pytest.mark.parametrize("unfinished", ["", '{"step": 9, "lo', '{"step": 9, "loss": 1.0}', "\0\0\0"])
def test_a_resume_leaves_what_an_undisturbed_run_has(tmp_path, stopped_at, unfinished):
    records = [line for t in range(1, 9) for line in ([training(t), evaluation(t)] if t % 4 == 0 else [training(t)])]
    records.insert(2, {"step": 2, "event": "skipped", "loss": math.nan})
    undisturbed = write(tmp_path, records)
    (tmp_path / "metrics.jsonl").write_text(undisturbed + unfinished, encoding="utf-8")
    again = [record for record in records if record["step"] > stopped_at]
    assert write(tmp_path, again, resume_step=stopped_at) == undisturbed
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_what_guards_tell_late_of_a_step_is_cut_with_the_steps_that_they_had_not_looked_at(tmp_path):
    """The run stopped after step 6, was looked at up to step 4, went on, was looked at in step 8, and was killed."""
    told = [{"step": step, "event": event, "loss": 9.0} for step in (3, 5) for event in ("spike", "skipped")]
    others = [{"step": 5, "event": "rollback"}, training(6)]
    write(tmp_path, [training(4), *told, *others, training(8)])
    with Metrics(tmp_path, resume_step=6, unseen=2):
        pass
    assert [json.loads(line) for line in text(tmp_path).splitlines()] == [training(4), *told[:2], *others]


def test_a_resume_without_a_file_begins_one(tmp_path):
    write(tmp_path, [training(5)], resume_step=4)
    assert len(read_metrics(tmp_path / "metrics.jsonl").training) == 1


def test_a_rollback_takes_lines_back(tmp_path):
    with Metrics(tmp_path, resume_step=None) as metrics:
        for step in range(1, 6):
            metrics.write(training(step))
        metrics.cut(2)
        metrics.write({"step": 2, "event": "rollback", "from_step": 6})
        metrics.write(training(3))
    found = read_metrics(metrics.path)
    assert [record["step"] for record in found.training] == [1, 2, 3]
    assert [record["event"] for record in found.events] == ["rollback"]


def test_a_new_run_does_not_write_into_another_ones_file(tmp_path):
    before = write(tmp_path, [training(1)])
    with pytest.raises(ValueError, match="exists already: resume that run"):
        Metrics(tmp_path, resume_step=None)
    assert text(tmp_path) == before


def test_ranks_without_a_voice_touch_nothing(tmp_path):
    with Metrics(tmp_path / "nowhere", resume_step=3, track=["tensorboard"], enabled=False) as metrics:
        metrics.write(training(4))
        metrics.cut(0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "broken",
    ["{", "[1]", "5", "{}", '{"step": 2}', '{"loss": 2.0}', '{"step": "2", "loss": 1.0}', "\udcff", "", "x" * 999],
)
def test_a_broken_line_is_named_and_nothing_is_changed(tmp_path, broken):
    lines = write(tmp_path, [training(1), training(2), training(3)]).splitlines(keepends=True)
    lines[1] = broken + "\n"
    damaged = "".join(lines).encode(errors="surrogateescape")
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(damaged)
    for attempt in (lambda: read_metrics(path), lambda: Metrics(tmp_path, resume_step=1)):
        with pytest.raises(
            ValueError, match=r"metrics\.jsonl, line 2 is not a line of metrics: .*; delete it"
        ) as caught:
            attempt()
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < len(str(path)) + 200
    assert path.read_bytes() == damaged


def test_a_record_without_its_step_is_our_own_mistake(tmp_path):
    with Metrics(tmp_path, resume_step=None) as metrics, pytest.raises(AssertionError):
        metrics.write({"loss": 1.0})


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with Metrics(tmp_path, resume_step=None) as metrics, pytest.raises(OSError, match=r"metrics\.jsonl") as caught:
        metrics.write(training(1))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_is_full_when_lines_are_cut_leaves_them(tmp_path):
    before = write(tmp_path, [training(1), training(2)])
    (tmp_path / "metrics.jsonl.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"metrics\.jsonl\.partial") as caught:
        Metrics(tmp_path, resume_step=1)
    assert caught.value.errno == errno.ENOSPC
    assert text(tmp_path) == before


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        Metrics(tmp_path / "nowhere", resume_step=None)


def endlessly(folder):
    with Metrics(folder, resume_step=None) as metrics:
        step = 0
        for written in itertools.count(1):
            step += 1
            metrics.write(training(step))
            if written % 500 == 0:
                step -= 100
                metrics.cut(step)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_kill_at_any_moment_leaves_a_file_to_go_on_with(tmp_path):
    context = multiprocessing.get_context("fork")
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        victim = context.Process(target=endlessly, args=(folder,))
        victim.start()
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.001)
        time.sleep(0.03 + 0.017 * attempt)
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        steps = [record["step"] for record in read_metrics(folder / "metrics.jsonl").training]
        assert sorted(set(steps)) == list(range(1, max(steps, default=0) + 1))
        with Metrics(folder, resume_step=min(10, len(steps))) as metrics:
            metrics.write(training(11))
        assert len(read_metrics(metrics.path).training) == min(10, len(steps)) + 1
