"""`sophia bench curvature`: the exact curvature, the order of the errors, what is multiplied. Never seconds."""

import functools
import json

import pytest
import torch
from torch.nn import functional as F

from sophia import bench_curvature, bench_curvature_cost, bench_curvature_error
from sophia.cli import main
from sophia.curvature import GaussNewtonBartlett, deferred_logits
from sophia.model import GPT, GPTConfig
from sophia.presets import default_curvature
from tests import exact

SHAPE = GPTConfig(vocab_size=24, context=16, layers=1, heads=2, width=16)
TINY = ["--model", "nano", "--vocab-size", "70", "--context", "8", "--rows", "64", "--rounds", "1"]


def test_the_exact_diagonal():
    """Against the tests' own, which multiplies whole Jacobians and Hessians."""
    model = GPT(SHAPE, torch.Generator().manual_seed(1)).double()
    tokens = bench_curvature_error.text(3, SHAPE)[:, :-1]
    found = bench_curvature_error.exact_diagonal(model, tokens)
    torch.testing.assert_close(found, exact.exact_gauss_newton(model, tokens, exact.categorical_hessian))


@pytest.fixture(scope="module")
def errors():
    rows = bench_curvature_error.measure(64, 40, lambda _: None, SHAPE)
    return {(row["rows"], row["chunks"], row["noise"]): row for row in rows}


def test_errors_have_the_order_that_theory_gives_them(errors):
    """2 for one chunk whatever its size, 2 / chunks for the whole batch, more for a part of it."""
    error = {key: row["error"] for key, row in errors.items()}
    official = error[64, 1, "labels"]
    assert 1.5 < official < 2.6
    assert 1.5 < error[32, 1, "labels"] < 3.5
    assert 0.2 < error[64, 4, "labels"] / official < 0.33
    assert error[64, 16, "labels"] < 0.12 * official
    assert error[64, 16, "signs"] < error[64, 16, "labels"]
    rows, chunks = default_curvature(64)
    assert (rows, chunks) == (4, 4)
    assert error[64, 4, "labels"] < error[8, 4, "labels"] < error[4, 4, "labels"] < official


def test_signs_are_nearer_in_the_rows_of_rare_tokens():
    """In the head a sampled label says something about its own row; signs say something about every row."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 4, 6, dtype=torch.float64, generator=generator)
    weight = torch.nn.Parameter(0.3 * torch.randn(500, 6, dtype=torch.float64, generator=generator))
    probs = (hidden @ weight.detach().T).softmax(-1)
    truth = torch.einsum("rtv,rtw->vw", probs * (1 - probs), hidden.square()) / 32
    error = {}
    for noise in ("labels", "signs"):
        estimator = GaussNewtonBartlett(noise=noise)
        forwards = [functools.partial(deferred_logits, row, weight) for row in hidden.split(1)]
        drawn = [estimator.estimate(forwards, [weight], exact.refresh(step=step))[0] for step in range(20)]
        error[noise] = sum(bench_curvature_error.median_error(one, truth) for one in drawn) / 20
    assert error["labels"] > 0.9
    assert error["signs"] < 0.45


def test_training_leaves_a_model_whose_predictions_are_not_uniform():
    tokens = bench_curvature_error.text(64, SHAPE)
    model = bench_curvature_error.trained(SHAPE, tokens)
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss < 0.9 * torch.tensor(24.0).log()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, (1, 1)), (3, (1, 1)), (8, (2, 2)), (16, (4, 4)), (64, (4, 4)), (480, (30, 4)), (960, (60, 4))],
)
def test_what_estimates_are_made_from_by_default(rows, expected):
    assert default_curvature(rows) == expected


def test_percent_is_what_the_text_says(monkeypatch):
    """A step of 64 rows in micro-batches of 2; 4 rows of curvature, one in a pass."""
    setup = bench_curvature._setup(
        bench_curvature.CurvatureBenchSettings(model="nano", vocab_size=70, context=8, rows=64, micro_batch=2)
    )
    assert (setup.chunk_rows, setup.product_rows, setup.config.head_rows) == (1, 1, 128)
    given = {"training": 3.0, "step": 4.0, "labels": 2.0, "signs": 2.5, "fold": 1.0, "official": 5.0}
    given |= {"double backward": 7.0, "difference": 6.0}
    rows = {"training": 2, "official": 2}
    runs = {name: (name, rows.get(name, 1)) for name in given}
    monkeypatch.setattr(bench_curvature_cost, "contenders", lambda setup: runs)
    monkeypatch.setattr(bench_curvature_cost, "timed", lambda run, device: given[run])
    result = bench_curvature_cost.measure(setup, 3, lambda _: None)
    steps = 10 * (64 / 2 * 3.0 + 4.0)
    percent = [line["percent"]["median"] for line in result["refreshes"]]
    assert percent == pytest.approx(
        [
            100 * part / steps
            for part in (
                4 * 2.0 + 1,
                4 * 2.5 + 1,
                64 / 2 * 5.0,
                32 / 2 * 5.0,
                64 * 7.0 + 1,
                8 * 7.0 + 1,
                64 * 6.0 + 1,
                8 * 6.0 + 1,
            )
        ]
    )
    assert all(len(line["rounds"]) == 3 for line in result["seconds"].values())


def test_contenders_do_what_they_are_called():
    """All refreshes end in estimates of the same parameters, and the official one leaves no gradient behind."""
    setup = bench_curvature._setup(
        bench_curvature.CurvatureBenchSettings(model="nano", vocab_size=70, context=8, rows=4)
    )
    runs = bench_curvature_cost.contenders(setup)
    model = runs["training"][0].func.__self__.model
    runs["training"][0]()
    assert all(p.grad is not None for p in model.parameters())
    runs["step"][0]()
    for name in ("labels", "signs", "official", "double backward", "difference"):
        runs[name][0]()
        assert all(p.grad is None for p in model.parameters())
        assert runs["fold"][0]() is True


def test_result_and_tables(tmp_path, capsys):
    out = tmp_path / "curvature.json"
    assert (
        main(
            [
                "bench",
                "curvature",
                *TINY,
                "--parts",
                "cost",
                "sampling",
                "--sampling-vocabularies",
                "70",
                "90",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    shown = " ".join(capsys.readouterr().out.split())
    result = json.loads(out.read_text())
    assert "Cost of a curvature estimate every 10 steps: nano, 64 sequences of 8 tokens a step, fp32" in shown
    assert "vocabulary of 90" in shown
    assert [one["vocab_size"] for one in result["sampling"]] == [70, 90]
    assert {"cpu", "threads", "torch", "date"} <= set(result["machine"])
    assert len(result["cost"]["refreshes"]) == 8
    for line in result["cost"]["refreshes"]:
        assert 0 < line["percent"]["min"] <= line["percent"]["median"] <= line["percent"]["max"]


def test_json_alone_is_on_stdout(monkeypatch, capsys):
    row = {"rows": 64, "chunks": 1, "noise": "labels", "error": 2.0}
    monkeypatch.setattr(bench_curvature_error, "measure", lambda rows, draws, tick: [row])
    assert main(["bench", "curvature", "--parts", "error", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["error"] == [row]
    assert "cost" not in result


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draws", "3"], "draws is 3: fewer than 20"),
        (["--error-rows", "40"], "error_rows is 40: it must be a multiple of 16"),
        (["--context", "0"], "context is 0: it must be at least 1"),
        (["--parts"], "parts is empty"),
        (["--device", "cuda"], "cuda is not available here"),
    ],
)
def test_settings_that_make_no_sense(flags, message, capsys):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(["bench", "curvature", *flags]) == 2
    assert message in capsys.readouterr().err
