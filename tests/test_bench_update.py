"""`sophia bench update`: what optimizers' own products cost."""

import json

import pytest

from sophia import cli
from sophia.accounting import flops_per_token
from sophia.presets import preset

SMALL = ["bench", "update", "--model", "nano", "--tokens-per-step", "2048", "--rounds", "1"]


def newton_schulz(rows, columns, steps=5):
    """Operations: X Xᵀ, its square, and its product with X."""
    short, long = sorted((rows, columns))
    return steps * (4 * short**2 * long + 2 * short**3)


def test_counts(capsys, tmp_path):
    out = tmp_path / "update.json"
    assert cli.main([*SMALL, "--optimizers", "muon", "sophia-k", "sophia-g", "--json", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    found, nano = result["results"], preset("nano")
    assert list(found) == ["adamw", "muon", "sophia-k", "sophia-g"]
    width = nano.width
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    orthogonal = nano.layers * sum(newton_schulz(*shape) for shape in shapes)
    assert found["adamw"]["flops"] == found["sophia-g"]["flops"] == 0
    assert found["muon"]["flops"] == orthogonal
    # Beside that, by step: the smaller side turned twice; by refresh: gram matrices, rotations and a QR in ten steps.
    turned = nano.layers * sum(4 * rows * columns * width for rows, columns in shapes)
    apart = [*[(width, width)] * 3, *shapes[1:]]  # queries, keys and values on their own
    own = turned + nano.layers * sum(newton_schulz(*shape) for shape in apart)
    assert own < found["sophia-k"]["flops"] < 1.25 * own
    training = flops_per_token(nano.config(50304)) * 2048
    assert result["training_flops"] == training
    assert found["muon"]["percent"] == pytest.approx(100 * orthogonal / training)
    # Four of sixteen sequences at every tenth step.
    assert found["sophia-k"]["curvature_percent"] == found["sophia-g"]["curvature_percent"] == pytest.approx(2.5)
    assert found["adamw"]["ratio"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--blocks", "5"], "blocks is 5: it must be at least 1 and at most the model's 4"),
        (["--rounds", "0"], "rounds is 0: it must be at least 1"),
        (["--tokens-per-step", "100"], "tokens_per_step is 100, no multiple of the 128 tokens of a sequence of nano"),
        (["--optimizers", "sophia-h"], "optimizers holds 'sophia-h': choose from sophia-g, sophia-k, adamw"),
        (["--model", "nan"], "model 'nan' is not a preset; did you mean nano?"),
    ],
)
def test_bad_input(words, message, capsys):
    assert cli.main([*SMALL, *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
