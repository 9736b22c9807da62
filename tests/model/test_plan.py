"""`sophia plan` as its user sees it."""

import json

import pytest
import torch

from sophia.cli import main
from sophia.gpus import GPUS
from sophia.plan import PlanSettings, remedies, set_up
from sophia.presets import PRESETS


def plan(capsys, *arguments):
    """The answer to `sophia plan ARGUMENTS --json`."""
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    """The one line with which `sophia plan ARGUMENTS` is refused."""
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_what_fits_is_said_with_its_parts(capsys):
    answer = plan(capsys, "--model", "gpt2-small", "--gpus", "8", "--gpu", "h100", "--micro-batch", "12")
    each = answer["memory"]["per_gpu"]
    assert answer["fits"]
    assert answer["changes"] == []
    assert each["total"] == sum(value for name, value in each.items() if name != "total")
    assert answer["memory"]["total"] == 8 * each["total"]
    assert each["total"] <= answer["memory"]["usable_per_gpu"] < 80 * 2**30
    assert each["parameters"] == 4 * answer["parameters"]["total"]
    assert answer["setup"]["micro_batches_per_step"] == 5


def test_time_and_cost_follow_from_the_operations(capsys):
    answer = plan(
        capsys,
        *("--model", "gpt2-small", "--gpus", "4", "--gpu", "a100-80", "--optimizer", "adamw", "--micro-batch", "8"),
        *("--tokens", "50B", "--utilisation", "0.5", "--price-per-gpu-hour", "2", "--vocab-size", "50304"),
    )
    speed = answer["speed"]
    flops = 6 * (12 * 12 * 768**2 + 50304 * 768) + 12 * 12 * 768 * 1024
    tokens_per_second = 4 * 312e12 * 0.5 / flops
    assert speed["tokens_per_second"] == pytest.approx(tokens_per_second)
    assert speed["days"] == pytest.approx(50e9 / tokens_per_second / 86400)
    assert speed["cost"] == pytest.approx(50e9 / tokens_per_second / 3600 * 4 * 2)
    assert speed["seconds_per_step"] == pytest.approx(491520 / tokens_per_second)


def test_curvature_and_checkpointing_take_time(capsys):
    common = ("--model", "30m", "--micro-batch", "1")
    seconds = [
        plan(capsys, *common, *more)["speed"]["seconds_per_step"]
        for more in (
            ["--optimizer", "adamw"],
            ["--optimizer", "sophia-g"],
            ["--optimizer", "sophia-k"],
            ["--optimizer", "sophia-h"],
            ["--optimizer", "sophia-h", "--activation-checkpointing"],
        )
    ]
    assert seconds == sorted(seconds)
    assert seconds[1] / seconds[0] == pytest.approx(1.00625)


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    settings = PlanSettings(model="gpt2-small", gpu="4090", gpus=8)
    setup = set_up(settings)
    assert setup.fits
    assert setup.own_rows % setup.micro_batch == 0
    larger = min(size for size in range(setup.micro_batch + 1, 61) if 60 % size == 0)
    assert not setup.changed(micro_batch=larger).fits


def test_what_does_not_fit_comes_with_remedies_in_order(capsys):
    answer = plan(
        capsys, "--model", "gpt2-medium", "--gpus", "2", "--gpu", "4090", "--micro-batch", "40", "--precision", "fp32"
    )
    assert not answer["fits"]
    words = [change["what"].split()[0] + change["what"].split()[-1] for change in answer["changes"][1:4]]
    assert answer["changes"][0]["what"].startswith("--micro-batch ")
    assert words == ["--activation-checkpointing" * 2, "--parallelfsdp", "--precisionbf16"]
    assert [change["what"] for change in answer["changes"][4:6]] == ["--state-dtype bf16", "--context 512"]
    assert answer["changes"][-1]["fits"]
    needed = answer["memory"]["per_gpu"]["total"]
    assert all(change["total"] < needed for change in answer["changes"])


def test_a_remedy_is_what_the_same_command_with_it_says(capsys):
    command = ("--model", "gpt2-xl", "--gpus", "8", "--gpu", "4090", "--micro-batch", "4")
    for change in plan(capsys, *command)["changes"]:
        if change["what"].startswith("--") and "micro" not in change["what"]:
            again = plan(capsys, *command, *change["what"].split())
            assert again["memory"]["per_gpu"]["total"] == change["total"]
            assert again["fits"] == change["fits"]


def test_more_gpus_are_the_last_remedy():
    setup = set_up(PlanSettings(model="gpt2-xl", gpus=1, gpu="a10", memory_gb=16, tokens_per_step=512 * 1024))
    assert not setup.fits
    *_, last = remedies(setup)
    assert "--gpus" in last.what
    assert last.setup.fits
    assert last.setup.parallel == "fsdp"


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("model", PRESETS)
def test_every_model_can_be_planned_on_every_gpu(name, model):
    setup = set_up(PlanSettings(model=model, gpu=name))
    assert setup.memory.total > 0


def test_on_the_cpu(capsys):
    answer = plan(capsys, "--model", "nano", "--device", "cpu", "--memory-gb", "4", "--vocab-size", "1024")
    assert answer["setup"]["precision"] == "fp32"
    assert answer["fits"]
    assert answer["memory"]["per_gpu"]["holes"] > 0
    assert answer["speed"]["peak_source"] == "a matrix product, timed now"
    assert answer["speed"]["tokens_per_second"] > 0
    assert "usable" in _shown(capsys, "--model", "nano", "--device", "cpu", "--peak-tflops", "0.1")


def _shown(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_tables_for_people(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = _shown(
        capsys,
        *("--model", "gpt2-xl", "--gpus", "8", "--gpu", "h100", "--tokens", "50B", "--price-per-gpu-hour", "2.5"),
    )
    for words in ("1437.9 M parameters", "8 × H100 SXM 80 GB", "optimizer state", "It fits", "50B in", "days", "cost"):
        assert words in shown
    shown = _shown(capsys, "--model", "gpt2-xl", "--gpu", "4090", "--memory-gb", "20")
    for words in ("RTX 4090 with 20 GiB", "It does not fit", "what to change", "--activation-checkpointing", "no"):
        assert words in shown


@pytest.mark.parametrize(
    ("text", "tokens"), [("50B", 5e10), ("1.5m", 1.5e6), ("2000", 2000), ("3e9", 3e9), ("1T", 1e12)]
)
def test_budgets_of_tokens(capsys, text, tokens):
    assert plan(capsys, "--model", "30m", "--micro-batch", "1", "--tokens", text)["speed"]["tokens"] == tokens


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gpt2-smal"], "did you mean gpt2-small?"),
        (["--gpu", "h1000"], "did you mean h100?"),
        (["--gpu", "tpu"], "--memory-gb"),
        (["--gpus", "0"], "gpus is 0; it must be at least 1"),
        (["--gpus", "-2"], "gpus is -2"),
        (["--price-per-gpu-hour", "-1"], "price_per_gpu_hour is -1.0; it must be at least 0"),
        (["--price-per-gpu-hour", "nan"], "price_per_gpu_hour is nan"),
        (["--micro-batch", "0"], "micro_batch is 0"),
        (["--micro-batch", "481"], "each device has 480 sequences in a step"),
        (["--context", "0"], "context is 0"),
        (["--context", "1000"], "choose --tokens-per-step 492000"),
        (["--gpus", "7"], "7 GPUs cannot share in whole sequences"),
        (["--utilisation", "40"], "a share of the peak and at most 1"),
        (["--utilisation", "0"], "utilisation is 0.0; it must be positive"),
        (["--headroom", "1"], "headroom is 1.0"),
        (["--memory-gb", "-5"], "memory_gb is -5.0"),
        (["--peak-tflops", "0"], "peak_tflops is 0.0"),
        (["--tokens", "fifty"], "tokens is 'fifty'; write a number"),
        (["--tokens", "0"], "tokens is '0'"),
        (["--vocab-size", "0"], "vocab_size is 0"),
        (["--optimizer", "lion", "--state-dtype", "bf16"], "state_dtype has no meaning for lion"),
        (["--device", "cpu", "--gpus", "2"], "no meaning with --device cpu"),
        (["--device", "cpu", "--gpu", "h100"], "no meaning with --device cpu"),
    ],
)
def test_bad_input(capsys, arguments, words):
    assert words in refused(capsys, *arguments)


def test_planning_touches_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("a plan is made where no GPU is"))
    plan(capsys, "--model", "gpt2-small", "--gpu", "h200")
