"""kill -9 at random moments, among them during the writing of a checkpoint: the end is the same bit for bit."""

import random
import signal
import time

import pytest

from tests.train import kills, runs

LONG = {"optimizer": "sophia-g", "dropout": 0.1, "steps": 60, "curvature-interval": 3, "eval-interval": 7}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "data")


def test_three_kills(tmp_path, data):
    """At a random step, while a checkpoint is being written, at another random step; then to the end."""
    draw = random.Random(0)
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert runs.train(data, whole, **LONG) == 0

    process = kills.start("--data", data, "--out", run, *runs.arguments(**LONG))
    first = draw.randrange(2, 18)
    assert kills.wait_for(process, lambda: kills.last_step(run) >= first)
    assert kills.kill(process, run).after_step < 60

    process = kills.start("--resume", run)
    assert kills.wait_for(process, lambda: kills.last_checkpoint(run) >= 20 and kills.is_writing(run))
    found = kills.kill(process, run)
    assert found.while_writing
    assert found.resumes_from >= 20

    process = kills.start("--resume", run)
    second = found.after_step + draw.randrange(3, 12)
    assert kills.wait_for(process, lambda: kills.last_step(run) >= second)
    assert kills.kill(process, run).after_step < 60

    code, said = kills.finish(kills.start("--resume", run))
    assert code == 0
    assert "validation loss" in said
    runs.assert_equal(whole, run)
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_interrupt_while_a_checkpoint_is_written_leaves_at_once_and_cleanly(tmp_path, data):
    """Python would crash on a thread that it stops inside foreign code."""
    run = tmp_path / "run"
    large = {"layers": 4, "width": 384, "optimizer": "adamw", "steps": 500, "checkpoint-interval": 2}
    process = kills.start("--data", data, "--out", run, *runs.arguments(**large))
    assert kills.wait_for(process, lambda: kills.is_writing(run))
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # to be taken as two; writing takes longer
    process.send_signal(signal.SIGINT)
    code, said = kills.finish(process)
    assert code == 130
    assert said.endswith("sophia: interrupted\n")
    assert kills.is_writing(run)
