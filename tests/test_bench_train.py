"""The training bench: it trains what it says, and the yardstick is as large as ours."""

import contextlib
import json

import pytest
import torch

from sophia import bench_train, cli
from sophia.bench_train import TrainBenchSettings

SMALL = ["--model", "nano", "--vocab-size", "70", "--context", "8", "--rows", "3", "--micro-batch", "2"]


def test_it_measures_all_in_turn(tmp_path, capsys):
    out = tmp_path / "train.json"
    arguments = [*SMALL, "--curvature-rows", "2", "--rounds", "2", "--device", "cpu", "--precision", "fp32"]
    assert cli.main(["bench", "train", *arguments, "--peak-tflops", "0.1", "--out", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(out.read_text(encoding="utf-8"))
    results = shown["results"]
    assert list(results) == ["transformers, adamw", "ours, adamw", "ours, sophia-g"]
    assert results["transformers, adamw"]["ratio"] == 1.0
    for row in results.values():
        assert len(row["seconds"]) == 2
        median = sorted(row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(10 * 3 * 8 / (sum(median) / 2))
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * shown["flops_per_token"] / 0.1e12)
    # The same model but for padding and biases.
    width, padding, biases = 128, 128 - 70, 4 * (9 + 2) * 128 + 128
    theirs, ours = (shown["parameters"][name] for name in ("transformers, adamw", "ours, adamw"))
    assert ours - theirs == padding * width - biases


@pytest.mark.parametrize("optimizer", [None, "adamw", "sophia-g"])
def test_a_round_moves_the_weights_with_fresh_curvature(optimizer):
    settings = TrainBenchSettings(model="nano", vocab_size=70, context=8, rows=3, micro_batch=2, device="cpu")
    job = bench_train._job(settings)
    if optimizer is None:
        loop = bench_train._PlainLoop(job)
    else:
        loop = bench_train._Ours(job, bench_train._recipe(settings, optimizer, 3), optimizer)
    before = [p.detach().clone() for p in loop.model.parameters()]
    bench_train._round(loop, torch.randint(70, (3, 9)))
    moved = [not torch.equal(p, old) for p, old in zip(loop.model.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) * 0.9
    if optimizer == "sophia-g":
        assert loop.optimizers.parts[0].param_groups[0]["accepted_refreshes"] == 1


def test_what_is_not_said_depends_on_the_device():
    job = bench_train._job(TrainBenchSettings(device="cpu"))
    assert (job.rows, job.micro_batch, job.config.context) == (4, 4, 256)
    assert job.autocast is contextlib.nullcontext


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], ["rounds is 0"]),
        (["--curvature-rows", "99"], ["curvature_rows is 99", "choose fewer"]),
        (["--peak-tflops", "-1"], ["peak_tflops is -1", "positive"]),
        (["--model", "gpt3"], ["gpt3"]),
    ],
)
def test_mistakes(arguments, words, capsys):
    assert cli.main(["bench", "train", *arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
