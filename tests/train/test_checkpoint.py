"""Checkpoints on disk: exact, whole or not there, checked, pruned."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from sophia import checkpoint
from sophia.checkpoint import Checkpoint, CheckpointWriter


def make(step=3, seed=0, size=5):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(size, 4, generator=generator)
    return Checkpoint(
        step=step,
        model={"a.weight": drawn, "b": torch.tensor([0.0, -0.0, float("inf"), float("nan")]).bfloat16()},
        optimizer={"0/a.weight/exp_avg": drawn * 2, "0/a.weight/step": torch.tensor(7.0)},
        state={"progress": {"elapsed": 0.1 + 0.2}, "optimizers": [[{"names": ["a.weight"], "settings": {"lr": 1e-4}}]]},
    )


def writer(folder, keep_last=2, keep_every=0, interval=1):
    return CheckpointWriter(folder, keep_last=keep_last, keep_every=keep_every, interval=interval)


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    written = make()
    found = checkpoint.read(checkpoint.write(tmp_path, written))
    for ours, theirs in ((written.model, found.model), (written.optimizer, found.optimizer)):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype
            assert torch.equal(value.view(-1).view(torch.uint8), theirs[name].view(-1).view(torch.uint8)), name
    assert found.state == {"format": checkpoint.FORMAT, "step": 3, **written.state}


def test_no_file_is_a_pickle(tmp_path):
    folder = checkpoint.write(tmp_path, make())
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]


def damage_missing(folder, name):
    (folder / name).unlink()


def damage_truncated(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])


def damage_bit(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [damage_missing, damage_truncated, damage_bit])
def test_damage_is_noticed_and_named(tmp_path, name, damage):
    folder = checkpoint.write(tmp_path, make())
    damage(folder, name)
    with pytest.raises(ValueError, match=r"remove .*step-00000003 to go on from the checkpoint before it"):
        checkpoint.read(folder)


def test_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    folder = checkpoint.write(tmp_path, make())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 99"):
        checkpoint.read(folder)


def test_choosing(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint.choose(tmp_path)
    for step in (20, 100, 3):
        checkpoint.write(tmp_path, make(step))
    (tmp_path / ".partial-00000200").mkdir()
    assert checkpoint.steps(tmp_path) == [3, 20, 100]
    assert checkpoint.choose(tmp_path).name == "step-00000100"
    assert checkpoint.choose(tmp_path, 20) == checkpoint.choose(tmp_path, "20")
    for wrong in (21, "last", "-1"):
        with pytest.raises(ValueError, match="it has those of steps 3, 20, 100"):
            checkpoint.choose(tmp_path, wrong)


def test_the_writer_keeps_the_last_and_every_so_many(tmp_path):
    ours = writer(tmp_path, keep_last=2, keep_every=10)
    for step in (5, 10, 15, 20, 25, 30):
        ours.save(make(step))
    ours.wait()
    assert checkpoint.steps(tmp_path) == [10, 20, 25, 30]


def test_a_write_that_fails_leaves_the_earlier_ones_and_says_so(tmp_path, monkeypatch):
    ours = writer(tmp_path)
    ours.save(make(1))
    ours.wait()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    ours.save(make(2))
    with pytest.raises(
        OSError, match=r"step 2 could not be written to .*No space left.*last complete one is of step 1"
    ):
        ours.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]
    checkpoint.verify(checkpoint.choose(tmp_path))
    monkeypatch.undo()
    ours.save(make(3))
    ours.wait()
    assert checkpoint.steps(tmp_path) == [1, 3]


@pytest.mark.skipif(not shutil.which("prlimit") and not hasattr(os, "setrlimit"), reason="needs a limit on file sizes")
def test_a_real_limit_on_space(tmp_path):
    """The kernel refuses the write itself, as a full disk does."""
    code = f"""
        import resource, signal
        from pathlib import Path
        from sophia import checkpoint
        from tests.train.test_checkpoint import make
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        checkpoint.write(Path({str(tmp_path)!r}), make(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            checkpoint.write(Path({str(tmp_path)!r}), make(2, size=10_000))
        except OSError as problem:
            print(problem)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "step 2 could not be written" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpoint.verify(checkpoint.choose(tmp_path))


def test_left_overs_of_a_kill_are_cleared_up(tmp_path):
    checkpoint.write(tmp_path, make(5))
    (tmp_path / ".partial-00000007").mkdir()
    (tmp_path / ".partial-00000007" / "model.safetensors").write_bytes(b"half")
    checkpoint.clear_up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    checkpoint.write(tmp_path, make(5)).rename(tmp_path / ".replaced-00000005")
    checkpoint.clear_up(tmp_path)
    checkpoint.verify(checkpoint.choose(tmp_path, 5))


def test_replacing_a_checkpoint_of_the_same_step(tmp_path):
    checkpoint.write(tmp_path, make(5, seed=1))
    found = checkpoint.read(checkpoint.write(tmp_path, make(5, seed=2)))
    assert torch.equal(found.model["a.weight"], make(5, seed=2).model["a.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_killed_while_writing_again_and_again_every_checkpoint_is_whole(tmp_path):
    """A process that does nothing but write checkpoints, killed at moments that fall into every part of that."""
    code = f"""
        from pathlib import Path
        from sophia import checkpoint
        from tests.train.test_checkpoint import make, writer
        ours = writer(Path({str(tmp_path)!r}))
        step = (checkpoint.steps(ours.folder) or [0])[-1]
        print("ready", flush=True)
        while True:
            step += 1
            ours.save(make(step, seed=step, size=20_000))
    """
    seen = 0
    for moment in (0.013, 0.029, 0.047):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        while not checkpoint.steps(tmp_path) or checkpoint.steps(tmp_path)[-1] <= seen:
            time.sleep(0.001)
        time.sleep(moment)
        process.kill()
        process.wait()
        process.stdout.close()
        for step in checkpoint.steps(tmp_path):
            found = checkpoint.read(checkpoint.choose(tmp_path, step))
            assert torch.equal(found.model["a.weight"], make(step, seed=step, size=20_000).model["a.weight"])
        seen = checkpoint.steps(tmp_path)[-1]


def test_the_manifest_holds_sizes_and_checksums(tmp_path):
    folder = checkpoint.write(tmp_path, make())
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert sorted(manifest) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert all(entry["bytes"] == (folder / name).stat().st_size for name, entry in manifest.items())
