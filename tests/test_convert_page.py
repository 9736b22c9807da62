"""docs/moving.md: its code runs, and it speaks of every converter and setting."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sophia
from sophia import convert

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "moving.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
def test_page(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    params = list(model.parameters())
    saved = {
        "state": {
            i: {"step": torch.tensor(20.0), "exp_avg": p * 0, "hessian": p * 0 + 1e-6} for i, p in enumerate(params)
        },
        "param_groups": [
            {"lr": 6e-4, "betas": (0.965, 0.99), "rho": 0.05, "weight_decay": 0.2, "params": list(range(len(params)))}
        ],
    }
    torch.save({"model": model.state_dict(), "optimizer": saved}, "ckpt.pt")
    tokens = torch.randint(0, 20, (12, 4, 6))
    scope = {
        "model": model,
        "loader": [(t, (t + 1) % 20) for t in tokens],
        "F": F,
        "sophia": sophia,
        "torch": torch,
        "decayed": params[1:2],
        "others": [params[0], *params[2:]],
    }
    exec(compile(code, "moving.md", "exec"), scope)
    assert isinstance(scope["optimizer"], sophia.Sophia)


def test_page_names_every_converter_and_setting():
    for name in convert.__all__:
        assert f"`{name}`" in PAGE, name
        for setting in inspect.signature(getattr(convert, name)).parameters:
            assert setting in ("others", "state_dict") or f"`{setting}" in PAGE, (name, setting)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (DOCS / target).exists(), target


def test_the_correction_of_the_momentum_fades():
    """What the page says: within 1 % from step 113 for β1 = 0.96, from step 130 for 0.965."""
    for beta1, step in ((0.96, 113), (0.965, 130)):
        assert 1 - beta1 ** (step - 1) < 0.99 <= 1 - beta1**step
        assert f"{step} for {beta1}" in PAGE
