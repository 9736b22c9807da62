"""Every command and every piece of code in the README runs."""

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import cli
from sophia.data.builtin import builtin_documents
from sophia.study import read

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    tokens = torch.randint(0, 20, (12, 4, 6))
    scope = {"model": model, "loader": [(t, (t + 1) % 20) for t in tokens], "F": F, "sophia": __import__("sophia")}
    scope["SophiaG"] = scope["sophia"].SophiaG
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["optimizer"].param_groups[0]["lr"] == 6e-4


def recipe(target):
    """The lines that make would run for a target whose environment is ready."""
    text = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/.ready", target], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [line for line in text.splitlines() if not line.startswith("make")]


def lines():
    """The command lines of each block, the walk-through's apart from the others'."""
    found = [[line for line in block.splitlines() if line] for block in blocks("sh")]
    (walk,) = [block for block in found if block[0].startswith("sophia prepare")]
    return walk, [line for block in found if block is not walk for line in block]


WALK, COMMANDS = lines()
SMALL = {
    "bench": ["--layers", "1", "--width", "16", "--vocab-size", "64", "--rounds", "1"],
    "plan": [],
    "train": [],
    "compare": ["--minutes", "0.001"],  # the first runs, and the report of them
}


def make_data(folder):
    """What the README calls data."""
    text = folder / "text.txt"
    text.write_text("\n".join(document.text for document in builtin_documents(600_000)), encoding="utf-8")
    options = ["--tokenizer", "bpe:300", "--validation-fraction", "0.1"]
    assert cli.main(["prepare", str(text), "--out", str(folder / "data"), *options]) == 0


def shrunk(study):
    """A study with the same optimizers and rules, of a tiny model in short runs."""
    small = {'model = "nano"': 'model = "nano"\nlayers = 1\nheads = 1\nwidth = 16\ncontext = 16'}
    small |= {"bpe:1024": "bpe:300", "tokens_per_step = 2048": "tokens_per_step = 64"}
    for old, new in small.items():
        study = study.replace(old, new)
    return re.sub(r"^tokens = .*$", "tokens = 1280", study, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command)
    if words == ["make", "demo"]:
        assert recipe("demo")[-1] == ".venv/bin/sophia demo"
        # The same command in a short form.
        tiny = {"steps": 3, "layers": 1, "heads": 1, "width": 16, "context": 16, "batch-size": 2}
        tiny |= {"text-bytes": 900_000, "validation-windows": 2, "validation-fraction": 0.3}
        assert cli.main(["demo", *(word for name, value in tiny.items() for word in (f"--{name}", str(value)))]) == 0
        assert (tmp_path / "demo-out" / "race.png").exists()
    elif words == ["make", "test"]:
        assert "pytest" in recipe("test")[-1]  # this run
    elif words[:2] == ["pip", "install"]:
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
        assert extras, words
        project = (ROOT / "pyproject.toml").read_text()
        for extra in (extras[1] or "").split(",") if extras[1] else []:
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
        # What is installed is tested by `make wheel-test`.
    elif words[0] == "sophia":
        if "my-study.toml" in words:
            make_data(tmp_path)
            (study,) = blocks("toml")
            (tmp_path / "my-study.toml").write_text(shrunk(study), encoding="utf-8")
        elif words[1] == "compare":
            own = tmp_path / "default.toml"
            own.write_text(shrunk(read.DEFAULT.read_text(encoding="utf-8")), encoding="utf-8")
            monkeypatch.setattr(read, "DEFAULT", own)
        assert cli.main([*words[1:], *SMALL[words[1]]]) == 0
        assert words[1] != "compare" or list(tmp_path.rglob("report.html"))
    else:
        pytest.fail(f"README has a command that no test runs: {command}")


def test_the_walk_through(tmp_path, monkeypatch, capsys):
    """From a folder of text to a model that transformers loads, with a kill on the way."""
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "my-texts"
    texts.mkdir()
    for number, document in enumerate(builtin_documents(2_500_000)):
        (texts / f"{number:04}.txt").write_text(document.text, encoding="utf-8")
    walk = iter(WALK)

    def run(*short):
        command = next(walk)
        print(f"$ {command}")
        assert cli.main([*shlex.split(command)[1:], *short]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    run("--validation-fraction", "0.05")
    # The training command itself, in a process of its own, with fewer and smaller steps; killed after a checkpoint.
    short = ["--steps", "12", "--tokens-per-step", "256", "--checkpoint-interval", "4", "--eval-windows", "4"]
    training = [sys.executable, "-m", *shlex.split(next(walk)), *short, "--eval-interval", "4"]
    with subprocess.Popen(training, stdout=subprocess.DEVNULL) as process:
        while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
            assert process.poll() is None, "training ended before its first checkpoint"
            time.sleep(0.01)
        process.kill()
    assert "after 12 steps" in run()
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000
    assert "bits" in run()
    assert "Once upon a time" in run("--max-tokens", "5")
    run()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "my-gpt2")
    ids = AutoTokenizer.from_pretrained(tmp_path / "my-gpt2")("Once upon a time", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, ids.shape[1], 4096)
    assert next(walk, None) is None


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
