"""`sophia bench step`: that it times what it says it does. Never how long that took."""

import json

import pytest
import torch
from rich.console import Console

from sophia import bench

SMALL = {"layers": 1, "width": 16, "vocab_size": 64, "rounds": 3, "foreach": True}
SOPHIAS = ["Sophia-G fused", "Sophia-G fused, bf16 state", "Sophia-G plain", "Sophia-G foreach"]
FLOORS = ["torch's additions", "a part for each thread", "pieces of 1 M", "pieces of 1 M, prefetched"]


@pytest.fixture(autouse=True)
def no_process(monkeypatch):
    """The first call is timed in a new process: once is enough."""
    monkeypatch.setattr(bench, "_first_call_seconds", lambda device: 1.5)


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"), [("gpt2", 148, 124_439_808), ("gpt2-xl", 580, 1_557_611_200)]
)
def test_shapes_are_those_of_gpt2(model, tensors, parameters):
    layers, width = bench._SIZES[model]
    shapes = bench.gpt2_shapes(layers=layers, width=width, vocab_size=50257)
    assert len(shapes) == tensors
    assert sum(torch.Size(shape).numel() for shape in shapes) == parameters


def test_contenders_step_real_state():
    shapes = bench.gpt2_shapes(layers=1, width=16, vocab_size=64)
    contenders = bench._contenders(shapes, bench.StepSettings(**SMALL))
    assert list(contenders) == ["AdamW fused", *SOPHIAS, *(f"floor: {name}" for name in FLOORS), "Tensor.copy_"]
    for name in ("AdamW fused", *SOPHIAS):
        optimizer = contenders[name].run.__self__
        before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        for _ in range(3):
            contenders[name].run()
        after = [p for group in optimizer.param_groups for p in group["params"]]
        assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        if name in SOPHIAS:  # both sides of the clip are exercised
            assert 0.1 < optimizer.stats()["clip_fraction"] < 0.9
    states = contenders["Sophia-G fused, bf16 state"].run.__self__.state.values()
    assert {state["exp_avg"].dtype for state in states} == {torch.bfloat16}


def test_the_step_moves_the_bytes_that_are_counted():
    """Contenders of one traffic are compared: the floors with the step, 2 bytes less for each state in bf16."""
    contenders = bench._contenders([(64,)], bench.StepSettings(**SMALL))
    traffic = {name: contender.bytes for name, contender in contenders.items()}
    assert {traffic[f"floor: {name}"] for name in FLOORS} == {traffic["Sophia-G fused"]} == {6 * 4}
    assert traffic["Sophia-G fused, bf16 state"] == 3 * 4 + 3 * 2
    assert traffic["AdamW fused"] == 7 * 4


@pytest.mark.parametrize("name", FLOORS)
def test_a_floor_reads_all_and_writes_two(name):
    """A floor that left something out would make the step look slow."""
    values = iter([3.0, 5.0, 7.0])
    p, m, h = [], [], []

    def draw(scale):
        kept = next(columns)
        kept += [torch.full((300,), next(values)), torch.full((1 << 14,), 1.0)]
        return kept

    columns = iter([p, m, h])
    gradients = [torch.full((300,), 11.0), torch.ones(1 << 14)]
    bench._floors(gradients, draw)[f"floor: {name}"].run()
    half = 1.0 if name == "torch's additions" else 0.5
    assert (p[0] == half * (3 + 7)).all()
    assert (m[0] == half * (5 + 11)).all()
    assert (p[1] == half * 2).all()
    assert (h[0] == 7).all()
    assert (gradients[0] == 11).all()


def test_result_and_table(tmp_path, capsys):
    out = tmp_path / "new" / "step.json"
    bench.step(bench.StepSettings(**SMALL, out=out))
    shown = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert "AdamW fused" in shown
    assert "1.5 s" in shown
    assert result["results"]["AdamW fused"]["ratio"] == 1
    assert result["floor"].startswith("floor: ")
    assert result["results"][result["floor"]]["ratio_to_floor"] == 1
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
