"""The examples: each one file that fits a few screens, says how it is run, and answers mistakes in a line; those about
loops run in their short form. (Those on images and captions have tests of their own.)
"""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from tests.pictures import is_picture

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
SHARED = sorted({path.stem for path in EXAMPLES.glob("*.py")} - set(SCRIPTS))
INSTALL = {"sklearn": "examples", "matplotlib": "examples", "lightning": "lightning"}  # package, extra; the others: hf

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),  # Lightning's own use of torch
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # and peft's own
]


@pytest.fixture
def example(monkeypatch):
    """Imports an example, as Python does that runs it: its neighbours are found. Without a package: a skip."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def load(name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as missing:
            if missing.name in SHARED or (missing.name or "").startswith("sophia"):
                raise
            pytest.skip(f"{missing.name} is not installed: pip install '.[{INSTALL.get(missing.name, 'hf')}]'")

    return load


def command(module, *words):
    """Runs `python examples/NAME.py WORDS` in this process; its exit code, 0 where it came to its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"examples/{module.__name__}.py", *words])
        try:
            module.main()
        except SystemExit as end:
            return end.code
    return 0


# ---- all of them


def test_all_are_known():
    """To the table of examples/README.md and to the documentation, with extras that there are."""
    mine = {"plain_loop", "hf_trainer", "hf_lora", "lightning_module", "accelerate_loop", "tune_gamma"}
    assert mine <= set(SCRIPTS)
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \|", readme, re.MULTILINE) == SCRIPTS
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"\[(\w+)\.py\]\(\.\./examples/\1\.py\)", page))) == SCRIPTS
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for text in (readme, page):
        (extras,) = re.findall(r"^pip install '\.\[([\w,]+)\]'$", text, re.MULTILINE)
        assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras.split(","))


@pytest.mark.parametrize("name", SCRIPTS + SHARED)
def test_it_is_one_file_that_can_be_read(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    if name in SHARED:
        assert any(
            re.search(rf"^(from|import) {name}\b", (EXAMPLES / f"{one}.py").read_text(), re.M) for one in SCRIPTS
        )
        return
    docstring = text.split('"""')[1]
    assert f"    python examples/{name}.py --out " in docstring
    assert not re.search(r"from_pretrained|load_dataset|https?://", text)  # offline


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_mistakes(name, example, tmp_path, capsys):
    module = example(name)
    assert command(module, "--help") == 0
    printed = capsys.readouterr().out
    assert f"python examples/{name}.py" in printed
    assert "--quick" in printed
    assert "--out" in printed
    assert command(module, "--qick") == 2
    assert "unrecognized arguments: --qick" in capsys.readouterr().err
    occupied = tmp_path / "a file"
    occupied.touch()
    assert command(module, "--quick", "--out", str(occupied)) == 2
    assert str(occupied) in capsys.readouterr().err.splitlines()[-1]


# ---- those about loops, in their short form


def quick(module, out, capsys):
    state = torch.get_rng_state()
    try:
        assert command(module, "--quick", "--out", str(out)) == 0
    finally:
        torch.set_rng_state(state)
    return capsys.readouterr().out


@pytest.fixture
def forgetful():
    """What Accelerate keeps in a process is gone before and after."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install '.[hf]'")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def forget():
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    forget()
    yield
    forget()


def test_plain_loop(example, tmp_path, capsys):
    module = example("plain_loop")
    printed = quick(module, tmp_path, capsys)
    assert is_picture(tmp_path / "plain-loop.png")
    page = (tmp_path / "sample.txt").read_text(encoding="ascii")
    assert page.startswith("The ")
    assert len(page) == 24
    assert page in printed
    losses = [float(found) for found in re.findall(r"loss (\d\.\d\d)", printed)]
    assert losses[-1] < losses[0] - 0.5
    source = (EXAMPLES / "plain_loop.py").read_text(encoding="utf-8")
    assert [line.split("#")[0].split("(")[0].strip() for line in source.splitlines() if "THE NEW LINE" in line] == [
        "optimizer.refresh_curvature"
    ]


def test_hf_trainer(example, forgetful, tmp_path, capsys):
    quick(example("hf_trainer"), tmp_path, capsys)
    assert is_picture(tmp_path / "trainer.png")
    page = (tmp_path / "sample.txt").read_bytes()
    assert page.startswith(b"The ")
    assert len(page) == 14


def test_hf_lora(example, forgetful, tmp_path, capsys):
    printed = quick(example("hf_lora"), tmp_path, capsys)
    assert is_picture(tmp_path / "lora.png")
    assert re.search(r"^frozen: \d+ weights in \d\d tensors, 0 of which moved$", printed, re.MULTILINE)
    assert re.search(r"^adapters: \d+ weights in (\d+) tensors, \1 of which moved$", printed, re.MULTILINE)
    before, after = map(float, re.search(r"the sources: (\d\.\d\d) -> (\d\.\d\d)", printed).groups())
    assert after != before


def test_lightning_module(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which it sets for good
    printed = quick(example("lightning_module"), tmp_path, capsys)
    assert is_picture(tmp_path / "lightning.png")
    first, last = map(float, re.search(r"loss (\d\.\d\d) -> (\d\.\d\d)", printed).groups())
    assert last < first


def test_accelerate_loop(example, forgetful, tmp_path, capsys):
    printed = quick(example("accelerate_loop"), tmp_path, capsys)
    assert is_picture(tmp_path / "accelerate.png")
    first, last = map(float, re.search(r"loss (\d\.\d\d) -> (\d\.\d\d)", printed).groups())
    assert last < first


def test_tune_gamma(example, tmp_path, capsys):
    printed = quick(example("tune_gamma"), tmp_path, capsys)
    assert is_picture(tmp_path / "tune-gamma.png")
    gammas = {way: float(gamma) for way, gamma in re.findall(r"^([\w ]+): gamma ([\d.e+-]+)", printed, re.MULTILINE)}
    assert list(gammas) == ["left alone", "by hand", "auto"]
    assert gammas["left alone"] == 0.003
    assert len(set(gammas.values())) == 3


def test_gamma_is_turned_as_the_documentation_says(example):
    turned = example("tune_gamma").turned
    page = (ROOT / "docs" / "optimizer.md").read_text(encoding="utf-8")
    high = re.search(r"^\| above (0\.\d) \|.*\| raise γ, by a factor of (\d+) to (\d+) \|$", page, re.MULTILINE)
    low = re.search(r"^\| below (0\.\d) \|.*\| lower γ", page, re.MULTILINE)
    assert int(high[2]) <= turned(1.0, float(high[1]) + 0.01) <= int(high[3])
    assert turned(1.0, float(low[1]) - 0.01) < 1
    assert turned(1.0, float(high[1])) == turned(1.0, float(low[1])) == 1
