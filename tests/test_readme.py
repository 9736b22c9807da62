"""Every command and every piece of code in the README runs."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sophia import cli

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


def commands():
    return [line for block in blocks("sh") for line in block.splitlines() if line]


@pytest.mark.parametrize("command", commands())
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
        extra = re.fullmatch(r"\.(?:\[(\w+)\])?", words[2])
        assert extra, words
        project = (ROOT / "pyproject.toml").read_text()
        assert extra[1] is None or re.search(rf"^{extra[1]} = \[", project, re.MULTILINE)
        # What is installed is tested by `make wheel-test`.
    elif words[0] == "sophia":
        assert cli.main([*words[1:], "--layers", "1", "--width", "16", "--vocab-size", "64", "--rounds", "1"]) == 0
    else:
        pytest.fail(f"README has a command that no test runs: {command}")


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
