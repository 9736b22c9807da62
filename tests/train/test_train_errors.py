"""What cannot work is refused with one line that says why, exit code 2, and everything left as it was."""

import errno
import json
import os
import resource
import shutil
import signal

import pytest
import torch

from sophia import checkpoint, session
from sophia.data.shards import Dataset
from sophia.data.tokenizer import byte_tokenizer
from sophia.export import export_model
from sophia.model import GPT, GPTConfig
from sophia.run import RunFolder, load_run
from tests.train import runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, data):
    """A run that was stopped after step 7, with checkpoints of steps 5 and 7, and the same run to its end."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patched:
        runs.without_plots(patched)
        assert runs.train(data, folder / "whole", dropout=0.1) == 0
        runs.signal_at(patched, signal.SIGTERM, 6)
        assert runs.train(data, folder / "stopped", dropout=0.1) == 143
    return folder


@pytest.fixture
def run(tmp_path, stopped):
    """A copy of the stopped run."""
    return shutil.copytree(stopped / "stopped", tmp_path / "run")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    runs.without_plots(monkeypatch)


def contents(folder):
    """All files below a folder, but for the lock that a refused resume leaves."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def refused(capsys, code, *parts):
    """One line on stderr with all of these parts."""
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.startswith("sophia: ")
    assert said.endswith("\n")
    assert said.count("\n") == 1, said
    for part in parts:
        assert str(part) in said, said
    return said


# ---- settings

BAD = [
    ({"steps": 0}, ["steps is 0", "at least 1"]),
    ({"steps": 2, "warmup_steps": 2}, ["warmup_steps 2 does not fit"]),
    ({"lr": "nan"}, ["lr is nan", "finite and above 0"]),
    ({"lr": "inf"}, ["lr is inf"]),
    ({"lr": 0}, ["lr is 0.0"]),
    ({"weight_decay": "nan", "optimizer": "adamw"}, ["weight_decay is nan", "at least 0"]),
    ({"beta1": 1, "optimizer": "muon"}, ["beta1 is 1.0", "below 1"]),
    ({"beta2": "nan", "optimizer": "muon"}, ["beta2 is nan"]),
    ({"gamma": "nan"}, ["gamma is nan"]),
    ({"gamma": 0.1, "optimizer": "lion"}, ["gamma has no meaning for lion"]),
    ({"gamma": "auto", "optimizer": "adamw"}, ["gamma has no meaning for adamw"]),
    ({"gamma": "auto", "clip_target": 1}, ["clip_target is 1.0", "above 0 and below 1"]),
    ({"clip_target": 0.5}, ["clip_target is 0.5", "gamma 0.5 does not follow it", "choose gamma auto"]),
    ({"clip_target": 0.5, "optimizer": "muon"}, ["clip_target has no meaning for muon"]),
    ({"eps": 0}, ["eps is 0.0", "at least 1.18e-38"]),
    ({"eps": "inf"}, ["eps is inf"]),
    ({"eps": 1e-8, "optimizer": "adamw"}, ["eps has no meaning for adamw"]),
    ({"bias_correction": True, "optimizer": "lion"}, ["bias_correction has no meaning for lion"]),
    ({"refresh_when": "after", "optimizer": "adamw"}, ["refresh_when has no meaning for adamw"]),
    ({"beta2": 0.9, "optimizer": "signum"}, ["beta2 has no meaning for signum", "choose sophia-g"]),
    ({"curvature_noise": "signs", "optimizer": "sophia-h"}, ["curvature_noise has no meaning for sophia-h"]),
    ({"curvature_noise": "signs", "optimizer": "muon"}, ["curvature_noise has no meaning for muon", "choose sophia-g"]),
    ({"gamma": "auto", "optimizer": "sophia-k"}, ["gamma is auto", "sophia-k", "give a number"]),
    ({"clip_target": 0.5, "optimizer": "sophia-k"}, ["clip_target has no meaning for sophia-k", "choose sophia-g"]),
    ({"bias_correction": True, "optimizer": "sophia-k"}, ["bias_correction has no meaning for sophia-k"]),
    ({"recipe": "paper", "optimizer": "sophia-k"}, ["recipe is paper, which has no settings for sophia-k"]),
    ({"basis": "both", "optimizer": "soap"}, ["basis has no meaning for soap", "choose sophia-k"]),
    ({"factors": "gradients"}, ["factors has no meaning for sophia-g", "choose sophia-k"]),
    ({"diagonal": "curvature"}, ["diagonal has no meaning for sophia-g"]),
    ({"exponent": 1, "optimizer": "sophia-h"}, ["exponent has no meaning for sophia-h"]),
    ({"clip": "True", "optimizer": "adamw"}, ["clip has no meaning for adamw"]),
    ({"orthogonalize": 5, "optimizer": "muon"}, ["orthogonalize has no meaning for muon"]),
    ({"update_rms": 0, "optimizer": "adamw"}, ["update_rms has no meaning for adamw"]),
    ({"nesterov": "False", "optimizer": "muon"}, ["nesterov has no meaning for muon"]),
    ({"others": "gradients", "optimizer": "muon"}, ["others has no meaning for muon"]),
    ({"exponent": -0.5, "optimizer": "sophia-k"}, ["exponent is -0.5", "finite and at least 0"]),
    ({"nu": 1.5, "optimizer": "sophia-k"}, ["nu is 1.5", "between 0 and 1"]),
    ({"nu": "nan", "optimizer": "sophia-k"}, ["nu is nan", "between 0 and 1"]),
    ({"nu": 0.5, "optimizer": "adamw"}, ["nu has no meaning for adamw", "choose sophia-k"]),
    (
        {"nu": 1, "others": "curvature", "optimizer": "sophia-k"},
        ["nu=1.0 has no effect: others='curvature'", "leave it out"],
    ),
    ({"split_qkv": "True", "optimizer": "muon"}, ["split_qkv has no meaning for muon", "choose sophia-k"]),
    ({"product_dtype": "bf16", "optimizer": "soap"}, ["product_dtype has no meaning for soap", "choose sophia-k"]),
    (
        {"factors": "gradients", "diagonal": "gradients", "curvature_rows": 2, "optimizer": "sophia-k"},
        ["curvature_rows is 2", "made of gradients alone", "leave it out"],
    ),
    ({"orthogonalize": -1, "optimizer": "sophia-k"}, ["orthogonalize is -1", "or 0 for none"]),
    ({"update_rms": -0.2, "optimizer": "sophia-k"}, ["update_rms is -0.2", "or 0 for whatever it is"]),
    (
        {"curvature_chunks": 5, "curvature_rows": 4, "optimizer": "sophia-k"},
        ["curvature_chunks is 5", "the 4 curvature_rows"],
    ),
    ({"curvature_interval": 3, "optimizer": "lion"}, ["curvature_interval has no meaning for lion"]),
    ({"basis_interval": 3, "optimizer": "muon"}, ["basis_interval has no meaning for muon", "choose soap"]),
    ({"basis_interval": 0, "optimizer": "soap"}, ["basis_interval is 0", "at least 1"]),
    ({"lr_by_name": "foo=1"}, ["lr_by_name: foo matches no parameter"]),
    ({"lr_by_name": "tokens.*=0"}, ["lr_by_name: 'tokens.*=0' is not PATTERN=FACTOR with a factor above 0"]),
    ({"recipe": "paper", "optimizer": "muon"}, ["recipe is paper, which has no settings for muon"]),
    ({"max_grad_norm": "nan"}, ["max_grad_norm is nan", "or 0 for any"]),
    ({"spike_sigmas": "nan"}, ["spike_sigmas is nan", "above 0"]),
    ({"final_lr_fraction": "nan"}, ["final_lr_fraction is nan", "between 0 and 1"]),
    ({"decay_fraction": 0}, ["decay_fraction is 0.0"]),
    ({"dropout": "nan"}, ["dropout is nan"]),
    ({"curvature_interval": 0}, ["curvature_interval is 0", "at least 1"]),
    ({"curvature_rows": 7}, ["curvature_rows is 7", "a step has 6 sequences"]),
    ({"curvature_chunks": 5, "curvature_rows": 4}, ["curvature_chunks is 5", "the 4 curvature_rows"]),
    ({"optimizer": "lion", "state_dtype": "bf16"}, ["state_dtype has no meaning for lion", "leave it out"]),
    ({"seed": -1}, ["seed is -1", "below 2**64"]),
    ({"seed": 2**64}, [f"seed is {2**64}"]),
    ({"curvature_chunks": 7}, ["curvature_chunks is 7", "the 6 curvature_rows"]),
    ({"keep_last": 0}, ["keep_last is 0"]),
    ({"keep_every": -1}, ["keep_every is -1"]),
    ({"micro_batch": 0}, ["micro_batch is 0", "or auto"]),
    ({"tokens_per_step": 100}, ["tokens_per_step is 100", "multiple of the context 16", "for example 96"]),
    ({"context": 5000, "tokens_per_step": 5000}, ["training data", "too few for one sequence of 5000"]),
    ({"context": 500, "tokens_per_step": 500}, ["validation data", "too few for one sequence of 500"]),
    ({"width": 15}, ["width 15 is not divisible by heads 2"]),
    ({"model": "nanno"}, ["model 'nanno'", "did you mean nano"]),
    ({"decay_by_name": "foo=1"}, ["foo matches no parameter"]),
    ({"device": "mps"}, ["device mps is not available"]),
    ({"init_from": "nowhere"}, ["nowhere"]),
]


@pytest.mark.parametrize(("flags", "parts"), BAD, ids=[" ".join(f"{k}={v}" for k, v in f.items()) for f, _ in BAD])
def test_a_setting_that_cannot_be_is_refused_before_anything_is_written(tmp_path, data, capsys, flags, parts):
    refused(capsys, runs.train(data, tmp_path / "runs" / "run", **flags), *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tracker_is_noticed_before_anything_is_written(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(capsys, runs.train(data, tmp_path / "run", track="wandb"), "pip install 'sophia-lm[wandb]'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("flag", "near"), [("--optimzer", "--optimizer"), ("--wieght-decay", "--weight-decay")])
def test_an_unknown_flag_names_the_nearest(tmp_path, data, capsys, flag, near):
    assert runs.sophia("train", "--data", data, "--out", tmp_path / "run", flag, "1") == 2
    said = capsys.readouterr().err
    assert flag in said
    assert near in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_names_the_nearest_and_the_file(tmp_path, capsys):
    (tmp_path / "my.toml").write_text("[optimizer]\nlerning_rate = 1\nwieght_decay = 0.1\n")
    code = runs.sophia("train", "--config", tmp_path / "my.toml")
    refused(capsys, code, tmp_path / "my.toml", "lerning_rate")
    (tmp_path / "my.toml").write_text("[schedule]\nwarmup_step = 1\n")
    refused(capsys, runs.sophia("train", "--config", tmp_path / "my.toml"), "did you mean warmup_steps?")


def test_a_config_file_that_is_not_there(tmp_path, capsys):
    refused(
        capsys, runs.sophia("train", "--config", tmp_path / "no.toml"), tmp_path / "no.toml", "does not exist: give"
    )


# ---- folders


def test_no_data_or_data_that_is_none(tmp_path, capsys):
    refused(capsys, runs.sophia("train", "--out", tmp_path / "run"), "no data: give --data")
    refused(capsys, runs.train(tmp_path, tmp_path / "run"), "is not a finished data folder", "sophia prepare")
    assert list(tmp_path.iterdir()) == []


def test_a_run_folder_that_exists_is_left_alone(data, run, capsys):
    before = contents(run)
    refused(capsys, runs.train(data, run), f"the run folder {run} exists", f"--resume {run}", "another --out")
    assert contents(run) == before


def test_a_run_folder_that_cannot_be_made(tmp_path, data, capsys, monkeypatch):
    (tmp_path / "file").write_text("here")
    code = runs.train(data, tmp_path / "file" / "run")
    refused(capsys, code, f"cannot be made (File exists: {tmp_path / 'file'})", "choose another --out")

    def full(settings, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(session, "write_toml", full)
    refused(capsys, runs.train(data, tmp_path / "run"), "cannot be made (No space left on device: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- resuming


def test_what_is_no_run(tmp_path, capsys):
    refused(capsys, runs.resume(tmp_path / "no"), "is not a run folder: it does not exist")
    refused(capsys, runs.resume(tmp_path), "is not a run folder: it has no config.toml")
    assert list(tmp_path.iterdir()) == []


OTHER = [
    ({"optimizer": "adamw"}, ["optimizer is adamw, but the run", "was started with sophia-g"]),
    ({"seed": 1}, ["seed is 1", "was started with 0"]),
    ({"layers": 3}, ["layers is 3", "was started with 2"]),
    ({"lr": 0.5}, ["lr is 0.5"]),
    ({"steps": 20}, ["steps is 20", "was started with 12"]),
    ({"tokens_per_step": 192}, ["tokens_per_step is 192"]),
    ({"dropout": 0}, ["dropout is 0"]),
    ({"precision": "bf16"}, ["precision is bf16"]),
    ({"eval_windows": 3}, ["eval_windows is 3"]),
    ({"on_spike": "rollback"}, ["on_spike is rollback"]),
    ({"eval_interval": 0}, ["eval_interval is 0"]),
    ({"out": "elsewhere"}, ["--out elsewhere", "leave --out away"]),
    ({"config": "some.toml"}, ["--config and --resume"]),
]


@pytest.mark.parametrize(("flags", "parts"), OTHER, ids=[next(iter(flags)) for flags, _ in OTHER])
def test_a_resume_with_other_settings_is_refused(run, capsys, flags, parts):
    before = contents(run)
    refused(capsys, runs.resume(run, **flags), *parts)
    assert contents(run) == before


def test_a_resume_with_other_data_is_refused(tmp_path, run, capsys):
    other, before = runs.write_data(tmp_path / "other", seed=1), contents(run)
    refused(capsys, runs.resume(run, data=other), f"{other} is not the data that {run} was trained on", "--data")
    assert contents(run) == before


def test_the_same_data_elsewhere_goes_on(tmp_path, stopped, run, data):
    assert runs.resume(run, data=shutil.copytree(data, tmp_path / "copy")) == 0
    runs.assert_equal(stopped / "whole", run)


def remove(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [remove, cut, flip])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_and_the_remedy_works(stopped, run, capsys, damage, name):
    damage(runs.latest(run) / name)
    before = contents(run)
    said = refused(capsys, runs.resume(run), runs.latest(run), "to go on from the checkpoint before it")
    assert contents(run) == before
    damaged = said.partition("remove ")[2].partition(" to go on")[0]
    shutil.rmtree(damaged)
    assert runs.resume(run) == 0
    runs.assert_equal(stopped / "whole", run)


def test_a_replacement_that_a_kill_interrupted_is_finished_first(stopped, run, capsys):
    """Between two renames the latest checkpoint has another name, and the new one is not complete."""
    runs.latest(run).rename(run / "checkpoints" / ".replaced-00000007")
    (run / "checkpoints" / ".partial-00000007").mkdir()
    assert runs.resume(run) == 0
    assert "going on after step 7" in capsys.readouterr().out
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]
    runs.assert_equal(stopped / "whole", run)


def test_a_finished_run_has_nothing_left_to_do(tmp_path, stopped, capsys):
    run = shutil.copytree(stopped / "whole", tmp_path / "run")
    before = contents(run)
    assert runs.resume(run) == 0
    assert "nothing left to do: the run was finished after step 12" in capsys.readouterr().out
    assert contents(run) == before


def test_one_process_at_a_time(stopped, run, capsys):
    before = contents(run)
    with RunFolder(run).occupied():
        refused(capsys, runs.resume(run), f"{run} is being trained by process {os.getpid()} on ", "stop it first")
        assert load_run(run).step == 7, "reading is free"
    assert contents(run) == before
    assert runs.resume(run) == 0
    runs.assert_equal(stopped / "whole", run)


def test_a_run_is_occupied_from_its_start_to_its_end(tmp_path, data, monkeypatch):
    """A process of its own would be refused, whenever it comes."""
    answers = []

    def act(index):
        try:
            with RunFolder(tmp_path / "run").occupied():
                answers.append("free")
        except ValueError:
            answers.append("occupied")

    runs.before_batch(monkeypatch, act)
    assert runs.train(data, tmp_path / "run", steps=3) == 0
    assert answers == ["occupied"] * 3
    act(0)
    assert answers[-1] == "free"


# ---- while training


def test_a_full_disk_ends_the_run_and_a_resume_is_as_if_it_never_was(tmp_path, stopped, data, monkeypatch, capsys):
    """The kernel itself refuses to write: files may not grow beyond a size that the second checkpoint needs."""

    def act(index):
        if index == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patched:
        runs.before_batch(patched, act)
        try:
            code = runs.train(data, tmp_path / "run", dropout=0.1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(
        capsys, code, "the checkpoint of step 10 could not be written", "the last complete one is of step 5", "--resume"
    )
    checkpoint.verify(runs.latest(tmp_path / "run"))
    assert runs.resume(tmp_path / "run") == 0
    runs.assert_equal(stopped / "whole", tmp_path / "run")


def test_metrics_that_cannot_be_written(tmp_path, stopped, data, monkeypatch, capsys):
    def act(index):
        if index == 8:
            size = (tmp_path / "run" / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patched:
        runs.before_batch(patched, act)
        try:
            code = runs.train(data, tmp_path / "run", dropout=0.1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    refused(capsys, code, "metrics.jsonl")
    assert runs.resume(tmp_path / "run") == 0
    runs.assert_equal(stopped / "whole", tmp_path / "run")


def shards(data, split="train"):
    return sorted(data.glob(f"{split}-*.tokens"))


def test_a_shard_cut_short_while_training(tmp_path, stopped, data, monkeypatch, capsys):
    """Through a memory map this would be the end of the process without a word."""
    ours = shutil.copytree(data, tmp_path / "data")
    kept = {path: path.read_bytes() for path in shards(ours)}

    def act(index):
        if index == 8:
            for path in kept:
                os.truncate(path, 400)

    with monkeypatch.context() as patched:
        runs.before_batch(patched, act)
        refused(capsys, runs.train(ours, tmp_path / "run", dropout=0.1), "train-0000", "has become shorter")
    checkpoint.verify(runs.latest(tmp_path / "run"))
    refused(capsys, runs.resume(tmp_path / "run"), "train-0000", "truncated")
    for path, content in kept.items():
        path.write_bytes(content)
    assert runs.resume(tmp_path / "run") == 0
    runs.assert_equal(stopped / "whole", tmp_path / "run")


def test_shards_deleted_while_training(tmp_path, stopped, data, monkeypatch, capsys):
    """Files that are open stay readable; the others are missed by name."""
    ours = shutil.copytree(data, tmp_path / "data")

    def act(index):
        if index == 8:
            for path in shards(ours):
                path.unlink(missing_ok=True)

    runs.before_batch(monkeypatch, act)
    assert runs.train(ours, tmp_path / "run", dropout=0.1) == 0
    runs.assert_equal(stopped / "whole", tmp_path / "run")
    refused(capsys, runs.resume(tmp_path / "run"), "train-00000.tokens is missing")


def test_a_shard_that_is_gone_before_it_was_opened(tmp_path, data, capsys, monkeypatch):
    ours = shutil.copytree(data, tmp_path / "data")
    start = session.start

    def start_and_lose(*args):
        begun = start(*args)
        for path in shards(ours):
            path.unlink()
        return begun

    monkeypatch.setattr("sophia.train_command.start", start_and_lose)
    refused(capsys, runs.train(ours, tmp_path / "run"), "train-0000", "is gone since the data was opened")


# ---- foreign weights


def export(folder, *, vocabulary=257, layers=2, context=16, tokenizer=None):
    shape = GPTConfig(vocab_size=vocabulary, context=context, layers=layers, heads=2, width=16, bias=True)
    model = GPT(shape, torch.Generator().manual_seed(5))
    export_model(model, tokenizer or byte_tokenizer(), folder, end_of_text=None, check=False)
    return model


def from_foreign(data, out, folder, **flags):
    shape = {"layers": None, "heads": None, "width": None}
    return runs.train(data, out, init_from=folder, **shape, **flags)


def test_foreign_weights_are_the_start_and_are_not_needed_again(tmp_path, data, monkeypatch):
    model = export(tmp_path / "foreign")
    assert from_foreign(data, tmp_path / "whole", tmp_path / "foreign") == 0
    runs.signal_at(monkeypatch, signal.SIGTERM, 0)
    assert from_foreign(data, tmp_path / "run", tmp_path / "foreign", warmup_steps=0) == 143
    weight = runs.weights(tmp_path / "run")["tokens.weight"][:257]
    assert 0 < (weight - model.tokens.weight).abs().max() < 0.01, "one step away from the foreign model"
    runs.signal_at(monkeypatch, signal.SIGTERM, 3)
    assert from_foreign(data, tmp_path / "stopped", tmp_path / "foreign") == 143
    shutil.rmtree(tmp_path / "foreign")
    assert runs.resume(tmp_path / "stopped") == 0
    runs.assert_equal(tmp_path / "whole", tmp_path / "stopped")


def test_foreign_weights_of_another_shape_or_vocabulary(tmp_path, data, capsys):
    export(tmp_path / "foreign", layers=3)
    code = runs.train(data, tmp_path / "run", init_from=tmp_path / "foreign")
    refused(capsys, code, "layers is 2, but the model in", "has 3: leave it out")
    export(tmp_path / "larger", vocabulary=300)
    refused(capsys, from_foreign(data, tmp_path / "run", tmp_path / "larger"), "300 token ids", "257")
    assert not (tmp_path / "run").exists()


def test_foreign_weights_of_another_tokenizer(tmp_path, data, capsys):
    tokenizer = byte_tokenizer()
    vocabulary = json.loads(tokenizer.to_str())
    pieces = vocabulary["model"]["vocab"]
    (first, a), (second, b) = list(pieces.items())[65:67]
    pieces[first], pieces[second] = b, a
    export(tmp_path / "foreign", tokenizer=type(tokenizer).from_str(json.dumps(vocabulary)))
    refused(capsys, from_foreign(data, tmp_path / "run", tmp_path / "foreign"), "tokenizer")
    assert not (tmp_path / "run").exists()


def test_the_data_of_these_tests_has_several_shards(data):
    dataset = Dataset.open(data)
    assert len(dataset.train.shards) > 1
