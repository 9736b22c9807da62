"""A checkpoint goes on under any engine on any number of ranks: as the undisturbed run, bit for bit if on the same."""

from dataclasses import replace

import pytest

from sophia import checkpoint
from tests.distributed import training
from tests.distributed.test_ranks_train import CLOSE, ENGINES, RUNS

# Step 4 lies between two refreshes of the curvature, which are due before steps 4 and 7.
MOVES = [
    ("labels", "alone", "ddp 2"),
    ("labels", "ddp 2", "ddp 4"),
    ("labels", "ddp 4", "alone"),
    ("labels", "ddp 2", "fsdp 2"),
    ("labels", "fsdp 4", "ddp 2"),
    ("labels", "hsdp 4", "fsdp 2"),
    ("labels", "alone", "hsdp 4"),
    ("hutchinson", "fsdp 2", "ddp 4"),
    ("auto", "fsdp 2", "ddp 4"),
    ("matrices", "fsdp 2", "ddp 2"),
    ("matrices", "alone", "fsdp 4"),
    ("adamw", "fsdp 2", "alone"),
    ("muon", "alone", "ddp 2"),
]


def go_on(trained, ranks, copy, run, origin, target):
    """Resume, on the target, what the origin had done by step 4; returns the undisturbed run and the ranks' notes."""
    parallel, world = ENGINES.get(origin, ("ddp", 1))
    undisturbed = trained(parallel, world, **RUNS[run])
    parallel, world = ENGINES.get(target, ("ddp", 1))
    settings = training.interrupted(undisturbed, copy)
    settings = replace(settings, machine=replace(settings.machine, parallel=parallel))
    if world == 1:
        return undisturbed, [training.run(settings, True)]
    return undisturbed, ranks.run(training.run, settings, True, world=world)


@pytest.mark.parametrize(("run", "origin", "target"), MOVES)
def test_from_one_number_of_ranks_to_another(trained, ranks, tmp_path, run, origin, target):
    undisturbed, notes = go_on(trained, ranks, tmp_path / "run", run, origin, target)
    training.assert_close(tmp_path / "run", undisturbed, **CLOSE)
    then, now = (f"{name[-1]} under {name[:-2]}" if name in ENGINES else "1" for name in (origin, target))
    expected = f"resumed with ranks {now} instead of {then}: the run goes on, but not bit for bit"
    assert expected in notes[0]


@pytest.mark.parametrize(
    ("run", "engine"),
    [
        ("labels", "ddp 2"),
        ("labels", "fsdp 2"),
        ("hutchinson", "ddp 2"),
        ("auto", "fsdp 2"),
        ("matrices", "fsdp 2"),
        ("adamw", "hsdp 4"),
    ],
)
def test_bit_for_bit_where_nothing_has_changed(trained, ranks, tmp_path, run, engine):
    undisturbed, notes = go_on(trained, ranks, tmp_path / "run", run, engine, engine)
    assert not any(notes)
    assert training.metrics(tmp_path / "run") == training.metrics(undisturbed)
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (checkpoint.choose(run / "checkpoints") / name for run in (tmp_path / "run", undisturbed))
        assert ours.read_bytes() == theirs.read_bytes(), name
