"""`sophia eval`."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from sophia import cli
from sophia.data.shards import Dataset
from tests.export.runs import model_at, write_data, write_run
from tests.export.small import TOKENIZERS, bpe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    write_data(folder / "data")
    write_run(folder / "run", folder / "data")
    return folder


def evaluate(capsys, *arguments):
    assert cli.main(["eval", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def reference_loss(model, data, starts):
    """One window after another, in float64."""
    tokens = Dataset.open(data).validation.read(0, Dataset.open(data).validation.tokens).astype("int64")
    losses = []
    for start in starts:
        window = torch.from_numpy(tokens[start : start + 25])
        with torch.no_grad():
            logits = model.double()(window[None, :-1])[0, :, :300]
        losses.append(F.cross_entropy(logits, window[1:]).item())
    return sum(losses) / len(losses)


def test_all_windows(place, capsys):
    found = evaluate(capsys, place / "run", "--limit", "all", "--batch", 3)
    split = Dataset.open(place / "data").validation
    windows = (split.tokens - 1) // 24
    assert found["windows"] == windows
    assert found["tokens"] == windows * 24
    loss = reference_loss(model_at(20), place / "data", range(0, windows * 24, 24))
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    bits = loss / math.log(2) * split.tokens / split.text_bytes
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert (found["step"], found["context"], found["run"]) == (20, 24, str(place / "run"))
    assert found["data_fingerprint"] == Dataset.open(place / "data").fingerprint


def test_a_run_is_measured_on_the_windows_of_its_training(place, capsys):
    assert evaluate(capsys, place / "run")["windows"] == 5
    assert evaluate(capsys, place / "run", "--limit", 2)["windows"] == 2
    assert evaluate(capsys, place / "run", "--batch", 1)["loss"] == pytest.approx(
        evaluate(capsys, place / "run", "--batch", 5)["loss"], abs=1e-6
    )


def test_an_older_checkpoint(place, capsys):
    old = evaluate(capsys, place / "run", "--checkpoint", 10, "--limit", 1)
    assert old["step"] == 10
    assert old["loss"] == pytest.approx(reference_loss(model_at(10), place / "data", [0]), abs=1e-5)


def test_bf16_is_near(place, capsys):
    exact, rough = evaluate(capsys, place / "run"), evaluate(capsys, place / "run", "--precision", "bf16")
    assert rough["loss"] != exact["loss"]
    assert rough["loss"] == pytest.approx(exact["loss"], rel=0.02)


def test_for_people(place, capsys):
    assert cli.main(["eval", str(place / "run")]) == 0
    shown = capsys.readouterr().out
    found = evaluate(capsys, place / "run")
    assert f"step 20, {5 * 24} tokens in 5 windows of 24 from the validation split of {place / 'data'}" in shown
    assert f"{found['loss']:.4f} nats a token" in shown
    assert f"bits per byte  {found['bits_per_byte']:.4f}" in shown


def test_a_model_folder_on_given_data(place, tmp_path, capsys):
    assert cli.main(["export", str(place / "run"), "--out", str(tmp_path / "out"), "--no-check"]) == 0
    capsys.readouterr()
    found = evaluate(capsys, tmp_path / "out", "--data", place / "data")
    assert found["loss"] == pytest.approx(evaluate(capsys, place / "run", "--limit", "all")["loss"], abs=1e-6)
    assert found["step"] is None
    assert cli.main(["eval", str(tmp_path / "out")]) == 2
    assert "is a model folder, which has no data: give --data" in capsys.readouterr().err


def reordered():
    """A tokenizer with as many tokens, that gives two of them each other's id."""
    content = json.loads(bpe().to_str())
    vocab = content["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("other", [TOKENIZERS["bytes"], reordered])
def test_data_of_another_tokenizer_is_refused(other, place, tmp_path, capsys):
    write_data(tmp_path / "data", tokenizer=other())
    assert cli.main(["eval", str(place / "run"), "--data", str(tmp_path / "data")]) == 2
    said = capsys.readouterr().err
    assert "was prepared with another tokenizer" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--limit", "0"], ["limit is 0"]),
        (["--batch", "0"], ["batch is 0"]),
        (["--checkpoint", "11"], ["no checkpoint 11", "10, 20"]),
        (["--data", "/nowhere"], ["/nowhere", "not a finished data folder"]),
    ],
)
def test_user_errors_are_one_line_and_2(place, arguments, words, capsys):
    assert cli.main(["eval", str(place / "run"), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert all(word in said.err for word in words), said.err


def test_data_that_has_moved(place, tmp_path, capsys):
    run = write_run(tmp_path / "run", tmp_path / "gone")
    assert cli.main(["eval", str(run)]) == 2
    assert f"the run's data folder {tmp_path / 'gone'} is not there any more: give its new place as --data" in (
        capsys.readouterr().err
    )
    assert evaluate(capsys, run, "--data", place / "data")["tokens"] == 5 * 24
