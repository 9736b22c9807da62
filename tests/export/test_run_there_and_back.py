"""From `sophia train` to eval, sample and export, and from an exported folder into training again."""

import json

import pytest

from sophia import cli
from tests.export.runs import write_data

SMALL = ["--layers", "2", "--heads", "2", "--width", "16", "--context", "16", "--attention-scale-by-layer", "True"]
SHORT = ["--tokens-per-step", "64", "--steps", "4", "--eval-windows", "6", "--micro-batch", "4", "--device", "cpu"]


def sophia(capsys, *arguments):
    assert cli.main([*map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def val_losses(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}


def test_a_trained_run_is_evaluated_sampled_exported_and_trained_further(tmp_path, capsys):
    data, run, out, again = (tmp_path / name for name in ("data", "run", "out", "again"))
    write_data(data)
    sophia(capsys, "train", "--data", data, "--out", run, *SMALL, *SHORT)
    trained = val_losses(run)

    found = json.loads(sophia(capsys, "eval", run, "--json", "--device", "cpu"))
    assert found["step"] == 4
    assert found["loss"] == pytest.approx(trained[4], abs=1e-5)

    words = ("--prompt", "Thirty spoons", "--max-tokens", 30, "--json", "--device", "cpu")
    written = json.loads(sophia(capsys, "sample", run, *words))
    assert written["samples"][0]["tokens"]

    assert "transformers gives the same logits" in sophia(capsys, "export", run, "--out", out)
    from_export = json.loads(sophia(capsys, "sample", out, *words))
    assert from_export["samples"] == written["samples"]

    sophia(capsys, "train", "--data", data, "--out", again, "--init-from", out, *SHORT)
    assert val_losses(again)[0] == pytest.approx(trained[4], abs=1e-5)
