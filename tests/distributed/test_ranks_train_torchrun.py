"""The commands of docs/many-gpus.md, and what only torchrun itself does: it passes signals on."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from sophia import checkpoint
from tests.distributed import training
from tests.distributed.launched import launch
from tests.distributed.test_ranks_train_errors import SMALL, slowly

ROOT = Path(__file__).parents[2]
COMMANDS = re.findall(r"^torchrun .*", (ROOT / "docs" / "many-gpus.md").read_text(), re.MULTILINE)


def command(*, having):
    (found,) = [line for line in COMMANDS if all(word in line for word in having)]
    return shlex.split(found)


def wait_for_lines(run, count, alive):
    while len(training.written(run)) < count:
        assert alive(), "ended too early"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run by the page's command for one node, stopped by SIGTERM to torchrun; and what it printed."""
    folder = tmp_path_factory.mktemp("torchrun")
    training.write_data(folder / "data")
    words = command(having=["--nproc-per-node=8", "--shutdown-timeout"])
    words = [*words, *SMALL, "--steps=100000"]
    words[words.index("--nproc-per-node=8")] = "--nproc-per-node=2"
    words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(words, cwd=folder, env=environment, **pipes) as process:
        try:
            wait_for_lines(folder / "run", 5, lambda: process.poll() is None)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return folder / "run", out, err


def test_torchrun_on_one_node_and_a_signal_to_it(stopped):
    run, out, err = stopped
    step = training.written(run)[-1]["step"]
    assert f"SIGTERM: stopped after step {step} of 100000" in out
    assert out.count("parameters, on cpu on 2 ranks") == 1
    assert checkpoint.steps(run / "checkpoints")[-1] == step
    assert "sophia/" not in err  # torchrun shows a traceback of its own


def test_the_run_goes_on_with_other_ranks(stopped, tmp_path, monkeypatch):
    run, _, _ = stopped
    words = command(having=["--resume"])
    assert words[1:4] == ["--nproc-per-node=4", "-m", "sophia"]
    monkeypatch.chdir(run.parent)
    before = checkpoint.steps(run / "checkpoints")[-1]
    launched = launch(tmp_path / "printed", *words[4:], world=4, prepare=slowly)
    wait_for_lines(run, len(training.written(run)) + 3, launched.processes[0].is_alive)
    launched.send(2, signal.SIGTERM)
    ended = launched.wait()
    assert [rank.code for rank in ended] == [128 + signal.SIGTERM] * 4, ended
    note = "resumed with ranks 4 under fsdp instead of 2 under ddp: the run goes on, but not bit for bit"
    assert [rank.out.count(note) for rank in ended] == [1, 0, 0, 0]
    assert checkpoint.steps(run / "checkpoints")[-1] > before


def test_the_commands_are_torchruns():
    """Of the one for several nodes only the form is checked."""
    parsed = [get_args_parser().parse_args(shlex.split(line)[1:]) for line in COMMANDS]
    assert [one.training_script for one in parsed] == ["sophia"] * 3
    (several,) = [one for one in parsed if one.nnodes == "2"]
    assert several.training_script_args[-2:] == ["--parallel", "hsdp"]
