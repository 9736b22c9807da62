"""What ranks do when something goes wrong: all of them end, exit code 2, and one line says why."""

import os
import resource
import signal
import time

import pytest

from sophia import checkpoint, distributed, rank_errors
from sophia.data.shards import Dataset
from sophia.step import Stepper
from tests.distributed import training
from tests.distributed.launched import launch

SMALL = [
    *("--layers=1", "--heads=1", "--width=4", "--context=8", "--tokens-per-step=96", "--micro-batch=3"),
    *("--optimizer=adamw", "--steps=6", "--warmup-steps=2", "--eval-windows=3", "--checkpoint-interval=2"),
    *("--device=cpu", "--log-interval=1"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    training.write_data(folder / "data")
    return folder


@pytest.fixture
def train(place, tmp_path):
    """Launch a training run on ranks; flags come after the usual ones."""

    def start(*flags, world=2, prepare=None):
        words = ["train", "--data", place / "data", "--out", tmp_path / "run", *SMALL, *flags]
        return launch(tmp_path / "printed", *words, world=world, prepare=prepare)

    return start


def assert_told_once(ended, *parts):
    """Every rank ends with code 2, and one line of one of them holds these parts."""
    assert [rank.code for rank in ended] == [2] * len(ended), ended
    (line,) = [line for rank in ended for line in rank.err.splitlines()]
    assert line.startswith("sophia: ")
    for part in parts:
        assert part in line
    return line


def write_nothing(rank):
    if rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # one byte into any file would kill it


def test_only_rank_0_writes_and_prints(train, tmp_path):
    first, second = train("--parallel", "fsdp", prepare=write_nothing).wait()
    assert (first.code, second.code) == (0, 0), second
    assert second.out == second.err == first.err == ""
    assert "on 2 ranks" in first.out
    assert "after 6 steps" in first.out
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4, 6]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--tokens-per-step", "56"], ["7 sequences", "cannot be divided among 2 ranks", "multiple of 2"]),
        (["--steps", "0"], ["steps is 0"]),
        (["--device", "cuda"], ["device cuda is not available"]),
        (["--config", "nowhere.toml"], ["nowhere.toml"]),
        (["--check-reference"], ["without torchrun"]),
        (["--parallel", "hsdp"], ["hsdp", "choose --parallel fsdp"]),
    ],
)
def test_an_error_of_all_ranks_is_told_once(train, tmp_path, flags, parts):
    if "cuda" in flags and os.path.exists("/dev/nvidia0"):
        pytest.skip("there is a GPU")
    line = assert_told_once(train(*flags).wait(), *parts)
    assert "rank 0" not in line
    assert not (tmp_path / "run").exists()


def test_arguments_are_refused_once(train):
    first, second = train("--stepps", "3", world=2).wait()
    assert (first.code, second.code) == (2, 2)
    assert "--steps" in first.err
    assert second.err == second.out == ""


def test_a_folder_that_exists_and_a_damaged_checkpoint(train, place, tmp_path):
    run = tmp_path / "run"
    training.run(training.settings(place / "data", run, "adamw"))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert_told_once(train().wait(), "exists", "--resume")
    damaged = checkpoint.choose(run / "checkpoints") / "model.safetensors"
    with damaged.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    ended = launch(tmp_path / "resumed", "train", "--resume", run).wait()
    assert_told_once(ended, str(damaged), "damaged", "remove")
    del before[damaged]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


def no_data(rank):
    if rank == 1:

        def absent(folder):
            raise ValueError(f"{folder} does not exist")

        Dataset.open = absent


def no_device(rank):
    if rank == 1:

        def absent(*_):
            raise ValueError("local rank 1 has no GPU of its own")

        distributed.pick_device = absent


def other_data(rank):
    if rank == 1:
        original = Dataset.open

        def altered(folder):
            dataset = original(folder)
            dataset.fingerprint = "0" * 64
            return dataset

        Dataset.open = altered


@pytest.mark.parametrize(
    ("prepare", "parts"),
    [
        (no_data, ["rank 1: ", "does not exist"]),
        (no_device, ["rank 1: local rank 1 has no GPU of its own"]),
        (other_data, ["not the same on ranks 0 and 1"]),
    ],
)
def test_what_one_rank_lacks_ends_all_before_anything_is_written(train, tmp_path, prepare, parts):
    assert_told_once(train(prepare=prepare).wait(), *parts)
    assert not (tmp_path / "run").exists()


def before_batch(number, act):
    original = Stepper.gradients

    def gradients(self, *args, index):
        if index == number:
            act()
        return original(self, *args, index=index)

    Stepper.gradients = gradients


def fail():
    raise OSError("the disk is gone")


def disk_gone(rank):
    rank_errors._PATIENCE_TO_TELL = 0.5
    if rank == 1:
        before_batch(3, fail)


def killed(rank):
    rank_errors._PATIENCE_TO_LEARN = 1.0
    if rank == 1:
        before_batch(3, lambda: os.kill(os.getpid(), signal.SIGKILL))


def mistaken(rank):
    rank_errors._PATIENCE_TO_TELL = 0.5
    if rank == 1:
        before_batch(3, lambda: {}[3])


def test_an_error_of_one_rank_in_the_midst_of_training_ends_all(train, tmp_path):
    assert_told_once(train(prepare=disk_gone).wait(), "rank 1: the disk is gone")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2]


def test_a_rank_that_is_killed_ends_the_others(train):
    first, second = train(prepare=killed).wait()
    assert (first.code, second.code) == (2, -signal.SIGKILL)
    (line,) = first.err.splitlines()
    assert line.startswith("sophia: no more sign of rank 1: killed, or out of memory")


def test_a_mistake_of_ours_shows_its_traceback_where_it_was(train):
    first, second = train(prepare=mistaken).wait()
    assert (first.code, second.code) == (2, 1)
    assert first.err == "sophia: rank 1: KeyError: 3\n"
    assert second.err.count("Traceback") == 1


def slowly(rank):
    original = Stepper.refresh

    def refresh(self, *args):
        time.sleep(0.05)
        original(self, *args)

    Stepper.refresh = refresh


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(train, tmp_path, number):
    run = tmp_path / "run"
    launched = train("--steps", "10000", prepare=slowly)
    while len(training.written(run)) < 4 and launched.processes[0].is_alive():
        time.sleep(0.02)
    launched.send(1, number)
    first, second = launched.wait()
    assert second.code == 128 + number
    assert first.code in (128 + number, 128 + signal.SIGTERM)  # it knows that it was to stop, no more
    (step,) = [line["step"] for line in training.written(run)[-1:]]
    assert checkpoint.steps(run / "checkpoints")[-1] == step
    assert f"stopped after step {step} of 10000, with a checkpoint" in first.out
    assert first.err == second.err == second.out == ""
