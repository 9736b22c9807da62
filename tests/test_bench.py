"""`sophia bench step`: that it times what it says it does. Never how long that took."""

import json

import pytest
import torch
from rich.console import Console

from sophia import bench

SMALL = {"layers": 1, "width": 16, "vocab_size": 64, "rounds": 3, "foreach": True}


def test_shapes_are_those_of_gpt2_small():
    shapes = bench.gpt2_shapes(layers=12, width=768, vocab_size=50257)
    assert len(shapes) == 148
    assert sum(torch.Size(shape).numel() for shape in shapes) == 124_439_808


def test_contenders_step_real_state():
    shapes = bench.gpt2_shapes(layers=1, width=16, vocab_size=64)
    contenders = bench._contenders(shapes, bench.StepSettings(**SMALL))
    assert list(contenders) == ["AdamW fused", "Sophia-G", "Sophia-G foreach", "Tensor.copy_"]
    for name in ("AdamW fused", "Sophia-G"):
        optimizer = contenders[name].__self__
        before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        for _ in range(3):
            contenders[name]()
        after = [p for group in optimizer.param_groups for p in group["params"]]
        assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    fraction = contenders["Sophia-G"].__self__.stats()["clip_fraction"]
    assert 0.1 < fraction < 0.9  # both sides of the clip are exercised


def test_result_and_table(tmp_path, capsys):
    out = tmp_path / "new" / "step.json"
    bench.step(bench.StepSettings(**SMALL, out=out))
    shown = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert "AdamW fused" in shown
    assert result["results"]["AdamW fused"]["ratio"] == 1
    assert result["tensors"] == 16
    assert {"cpu", "threads", "torch", "date"} <= set(result["machine"])
    for row in result["results"].values():
        assert row["milliseconds_min"] <= row["milliseconds"] <= row["milliseconds_max"]


def test_json_alone_is_on_stdout(capsys):
    bench.step(bench.StepSettings(**SMALL, json=True))
    assert json.loads(capsys.readouterr().out)["bench"] == "step"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ValueError, match="--device cpu"):
        bench.StepSettings(device="cuda")


def test_the_progress_bar_is_not_in_the_way():
    result = bench.measure(bench.StepSettings(**SMALL), Console(quiet=True))
    assert result["settings"]["rounds"] == 3
