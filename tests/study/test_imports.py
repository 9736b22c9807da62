"""Mistakes in import paths are found before the first run."""

import sys
from pathlib import Path

import pytest

from sophia.cli import main
from sophia.study import read
from sophia.study.imports import imports
from tests.study import tiny
from tests.train import runs

MODULE = """
import torch

class Heavy(torch.optim.SGD):
    def __init__(self, params, lr, weight_decay=0.0, momentum=0.9):
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum)

class Plain:
    pass

def hook(context):
    pass
"""
ENTRY = """
[[optimizer]]
name = "heavy"
optimizer = "heavy_module:Heavy"
hook = "heavy_module:hook"
lr = 1e-2
arguments = ["momentum=0.95"]
search = { weight_decay = [0.1, 0.3] }
[[ablation]]
name = "light"
of = "heavy"
arguments = ["momentum=0.5"]
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a study with this table beside the module that it names."""
    (tmp_path / "heavy_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda more: tiny.write_study(tmp_path, "data", more=more)
    sys.modules.pop("heavy_module", None)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"heavy_module:Heavy"', '"missing.module:Heavy"', "optimizer heavy: optimizer missing.module:Heavy: there is"),
        ('"heavy_module:Heavy"', '"heavy_module:Heavier"', r"optimizer heavy: .* has no Heavier \(did you mean Heavy"),
        ('"heavy_module:Heavy"', '"heavy_module:Plain"', "optimizer heavy: .*Plain is no class of a torch.optim"),
        ('"heavy_module:hook"', '"heavy_module:hock"', "optimizer heavy: hook heavy_module:hock: .* has no hock"),
        ("momentum=0.95", "momentun=0.95", "optimizer heavy: arguments: momentun has no meaning"),
        ("momentum=0.5", "nesterov=True", "ablation light: arguments: nesterov has no meaning"),
        ("weight_decay = [0.1, 0.3]", "arguments = [['dampening=0.1']]", "optimizer heavy: search: arguments: dampen"),
    ],
)
def test_a_mistake_is_named_with_its_entry(write, old, new, said):
    assert ENTRY.count(old) == 1
    with pytest.raises(ValueError, match=said):
        imports(read.read_study(write(ENTRY.replace(old, new))))


def test_what_is_right_passes(write):
    imports(read.read_study(write(ENTRY)))


def test_no_run_is_begun(write, tmp_path, capsys):
    """Not even the baseline's, which come first and may take hours."""
    data = runs.write_data(tmp_path / "data")
    write(ENTRY.replace("heavy_module:Heavy", "heavy_module:Heavier"))
    assert data.exists()
    assert main(["compare", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "optimizer heavy: optimizer heavy_module:Heavier" in capsys.readouterr().err
    assert not (tmp_path / "out" / "runs.jsonl").exists()
    assert not (tmp_path / "out" / "work").exists()


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "benchmarks" / "studies").glob("*.toml")), ids=lambda path: path.stem
)
def test_the_studies_of_this_repository_could_begin(path):
    """Among them ablations that need all sequences of the common batch, beside a smaller batch of the pair."""
    imports(read.read_study(path))
