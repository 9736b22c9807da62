"""`sophia bench loader`: that it times what it says it does. Never how long that took."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from sophia import cli
from sophia.bench_loader import LoaderBenchSettings, loader
from sophia.data.shards import write_dataset

SMALL = {"models": ("nano",), "tokens_per_step": 300, "vocab_size": 20, "data_tokens": 70_000, "rounds": 3}


def test_result_and_table(tmp_path, capsys):
    out = tmp_path / "new" / "loader.json"
    loader(LoaderBenchSettings(**SMALL, out=out))
    shown = capsys.readouterr().out
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["tokens"] == 70_000
    assert {"cpu", "threads", "torch", "date"} <= set(result["machine"])
    nano = result["results"]["nano"]
    assert (nano["rows"], nano["context"]) == (2, 128)
    assert nano["times"]["step alone"]["ratio"] == 1
    assert all(label in shown for label in nano["times"])
    for row in nano["times"].values():
        assert 0 < row["milliseconds_min"] <= row["milliseconds"] <= row["milliseconds_max"]
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    waiting, ahead = nano["times"]["of which waiting"], nano["times"]["step, reading ahead"]
    assert waiting["milliseconds_max"] < ahead["milliseconds_max"]


def test_json_alone_is_on_stdout(capsys):
    loader(LoaderBenchSettings(**SMALL, json=True))
    assert json.loads(capsys.readouterr().out)["bench"] == "loader"


def test_data_of_ones_own(tmp_path, capsys):
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(9)}))
    ids = np.arange(1000) % 9
    write_dataset(tmp_path / "data", tokenizer, train=[ids], validation=[], end_of_text=None)
    loader(LoaderBenchSettings(**SMALL | {"data": tmp_path / "data"}, json=True))
    assert json.loads(capsys.readouterr().out)["tokens"] == 1000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], ["rounds is 0", "at least 1"]),
        (["--vocab-size", "1"], ["vocab_size is 1"]),
        (["--models", "nanno"], ["nanno", "nano"]),
        (["--data", "/nowhere"], ["/nowhere"]),
        (["--models", "nano", "--data-tokens", "100"], ["100 tokens", "sequence of 128"]),
    ],
)
def test_user_errors_are_one_line_and_2(arguments, words, capsys):
    assert cli.main(["bench", "loader", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in words), error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused():
    with pytest.raises(ValueError, match="--device cpu"):
        LoaderBenchSettings(device="cuda")
