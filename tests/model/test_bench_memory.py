"""`sophia bench memory`."""

import json

import pytest
import torch

from sophia import bench_memory_loss
from sophia.bench_memory import CPU_CASES, CUDA_CASES, Case, measure
from sophia.cli import main
from sophia.memory import step_memory


def test_a_case_is_measured_in_a_process_of_its_own():
    case = Case(model="nano", vocab_size=1024, micro_batch=32, rows=64, optimizer="sophia-g")
    row = measure(case, "cpu")
    assert row["estimate"]["total"] / row["measured"] == row["ratio"]
    assert row["ratio"] == pytest.approx(1, abs=0.35)  # the heap's luck included; the committed run says 15 %


def test_results_go_to_a_file_and_a_table(capsys, tmp_path, monkeypatch):
    made = {"case": CPU_CASES[0], "measured": 2**27}
    monkeypatch.setattr(
        "sophia.bench_memory.measure",
        lambda case, device: {
            "case": vars(case),
            "estimate": case.estimate(device),
            "measured": made["measured"],
            "ratio": case.estimate(device)["total"] / made["measured"],
        },
    )
    assert main(["bench", "memory", "--only", "nano", "--out", str(tmp_path / "memory.json")]) == 0
    assert "estimates within 15%" in " ".join(capsys.readouterr().out.split())
    result = json.loads((tmp_path / "memory.json").read_text())
    assert [row["case"]["model"] for row in result["results"]] == ["nano", "nano"]


@pytest.mark.parametrize("case", [*CPU_CASES, *CUDA_CASES], ids=str)
def test_every_case_can_be_estimated(case):
    assert (
        case.estimate("cuda")["total"]
        >= step_memory(
            case.config, micro_batch=1, optimizer="lion", precision="bf16", device="cuda", accumulates=False
        ).parameters
    )


def test_cases_that_are_not_there(capsys):
    assert main(["bench", "memory", "--only", "llama"]) == 2
    assert "the cases on cpu are of nano, micro" in capsys.readouterr().err


def test_the_loss_is_compared_with_the_plain_one(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_memory_loss, "VOCAB", 300)
    monkeypatch.setattr(bench_memory_loss, "ROWS", 320)
    monkeypatch.setattr(bench_memory_loss, "_measured", lambda what, precision, loss, device: 3 << 20)
    assert main(["bench", "memory", "--loss", "--out", str(tmp_path / "loss.json")]) == 0
    assert "ours, chunked" in capsys.readouterr().out
    result = json.loads((tmp_path / "loss.json").read_text())
    assert [row["what"] for row in result["memory"]] == ["loss alone"] * 6 + ["training step"] * 2
    assert {len(taken) for losses in result["seconds"].values() for taken in losses.values()} == {4}


def test_all_compared_losses_are_one(monkeypatch):
    monkeypatch.setattr(bench_memory_loss, "VOCAB", 300)
    monkeypatch.setattr(bench_memory_loss, "ROWS", 320)
    inputs = bench_memory_loss._inputs(20, torch.device("cpu"))
    first, *others = (loss(*inputs).item() for loss in bench_memory_loss.LOSSES.values())
    assert others == pytest.approx([first, first], rel=1e-5)


@pytest.mark.parametrize("case", [("loss alone", "fp32", "plain"), ("training step", "bf16", "ours, chunked")])
def test_a_loss_is_measured_in_this_process(case, monkeypatch, capsys):
    for name, value in {"VOCAB": 300, "ROWS": 320, "WIDTH": 24, "SEQUENCES": 1, "CONTEXT": 8}.items():
        monkeypatch.setattr(bench_memory_loss, name, value)
    bench_memory_loss.work(json.dumps([*case, "cpu"]))
    assert isinstance(json.loads(capsys.readouterr().out)["peak"], int)


def test_the_loss_has_no_preset(capsys):
    assert main(["bench", "memory", "--loss", "--only", "nano"]) == 2
    assert "leave one of both out" in capsys.readouterr().err
