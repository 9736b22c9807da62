"""Bad input to `sophia prepare`: one clear line, exit code 2, nothing overwritten."""

import gzip
import json

import pytest

from sophia.cli import main
from sophia.data.prepare import Journal, SplitWriter
from tests.data import plain


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("good.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in plain.texts(60))


def refused(capsys, *arguments):
    """The one line that a refusal prints."""
    assert main(["prepare", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("sophia: ")
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


FILES = {
    "empty": ("a.txt", b"", ["a.txt", "empty"]),
    "empty inside": ("a.txt.gz", gzip.compress(b""), ["a.txt.gz", "empty"]),
    "only blank lines": ("a.jsonl", b"\n\n", ["a.jsonl", "empty"]),
    "binary": ("a.txt", b"\x7fELF\x02\x01\x01" + bytes(100), ["a.txt", "binary", "offset 7"]),
    "invalid UTF-8": ("a.txt", b"caf\xe9 au lait", ["a.txt", "offset 3", "0xe9", "--invalid-utf8 replace"]),
    "UTF-16": ("a.txt", "text".encode("utf-16"), ["a.txt", "UTF-16", "iconv"]),
    "no field": ("a.jsonl", b'{"text": "x"}\n{"body": "x"}', ["line 2 of a.jsonl", "'text'", "body", "--text-field"]),
    "no JSON": ("a.jsonl", b"plain text", ["line 1 of a.jsonl", "JSON"]),
    "an array": ("a.json", b'[{"text": "x"}]', ["a.json", "jq"]),
    "no gzip": ("a.txt.gz", b"plain text", ["a.txt.gz", "damaged"]),
    "gzip in the middle": ("a.txt.gz", gzip.compress(b"text" * 1000)[:-9], ["a.txt.gz", "truncated"]),
    "no parquet": ("a.parquet", b"plain text", ["a.parquet", "no parquet"]),
}


@pytest.mark.parametrize("case", FILES)
def test_files(tmp_path, capsys, case):
    name, data, words = FILES[case]
    (tmp_path / name).write_bytes(data)
    for sources in ([name], ["good.jsonl", name]):
        error = refused(capsys, *sources, "--out", "data", "--tokenizer", "bytes")
        assert all(word in error for word in words), error
        assert not (tmp_path / "data" / "manifest.json").exists()


SETTINGS = {
    "no sources": (["--out", "data"], ["no source"]),
    "no folder": (["good.jsonl"], ["--out"]),
    "no such source": (["nix.txt", "--out", "data"], ["nix.txt"]),
    "nothing to verify": (["--verify"], ["--verify DATA"]),
    "verify what is no data": (["--verify", "."], ["manifest.json"]),
    "verify nothing": (["--verify", "nix"], ["nix", "no such folder"]),
    "no workers": (["good.jsonl", "--out", "data", "--workers", "0"], ["workers is 0"]),
    "fraction 0": (["good.jsonl", "--out", "data", "--validation-fraction", "0"], ["validation_fraction is 0.0"]),
    "fraction 1": (["good.jsonl", "--out", "data", "--validation-fraction", "1"], ["validation_fraction is 1.0"]),
    "no shards": (["good.jsonl", "--out", "data", "--shard-tokens", "0"], ["shard_tokens is 0"]),
    "tiny documents": (["good.jsonl", "--out", "data", "--document-bytes", "3"], ["document_bytes is 3"]),
    "huge documents": (["good.jsonl", "--out", "data", "--document-bytes", "9999999"], ["document_bytes is 9999999"]),
    "out is a file": (["good.jsonl", "--out", "good.jsonl"], ["good.jsonl is a file"]),
    "out below a file": (["good.jsonl", "--out", "good.jsonl/data"], ["good.jsonl"]),
    "out holds others": (["good.jsonl", "--out", "."], ["holds other files", "good.jsonl"]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(tmp_path, capsys, case):
    before = plain.files(tmp_path)
    arguments, words = SETTINGS[case]
    more = [] if "--verify" in arguments else ["--tokenizer", "bytes"]
    error = refused(capsys, *arguments, *more)
    assert all(word in error for word in words), error
    assert plain.files(tmp_path) == before


@pytest.mark.parametrize("word", ["--invalid-utf8 maybe", "--shard-tokens many", "--nonsense"])
def test_unknown_words(word, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["prepare", "good.jsonl", "--out", "data", *word.split()])
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def prepare(*more, fraction="0.2", out="data", source="good.jsonl"):
    return main(["prepare", source, "--out", out, "--tokenizer", "bytes", "--validation-fraction", fraction, *more])


def test_a_finished_folder_is_replaced_only_on_demand(tmp_path, capsys):
    assert prepare() == 0
    before = plain.files(tmp_path / "data")
    error = refused(capsys, "good.jsonl", "--out", "data", "--tokenizer", "bytes")
    assert "finished" in error
    assert "--overwrite" in error
    assert plain.files(tmp_path / "data") == before
    assert prepare("--overwrite", fraction="0.5") == 0
    assert plain.files(tmp_path / "data") != before
    assert prepare("--overwrite") == 0
    assert plain.files(tmp_path / "data") == before


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", ["notes.txt", "train-00000.tokens", "tokenizer.json", "manifest.json", "sub"])
def test_other_peoples_folders_are_left_alone(tmp_path, capsys, name, flag):
    (tmp_path / "data").mkdir()
    if name == "sub":
        (tmp_path / "data" / name).mkdir()
    else:
        (tmp_path / "data" / name).write_text('{"mine": true}')
    error = refused(capsys, "good.jsonl", "--out", "data", "--tokenizer", "bytes", *flag)
    assert "data" in error
    assert [path.name for path in (tmp_path / "data").iterdir()] == [name]


def test_other_files_beside_ours_are_left_alone(tmp_path, capsys):
    assert prepare() == 0
    (tmp_path / "data" / "notes.txt").write_text("mine")
    before = plain.files(tmp_path / "data")
    error = refused(capsys, "good.jsonl", "--out", "data", "--tokenizer", "bytes", "--overwrite")
    assert "notes.txt" in error
    assert plain.files(tmp_path / "data") == before


def test_what_fails_before_the_start_replaces_nothing(tmp_path, capsys):
    assert prepare() == 0
    before = plain.files(tmp_path / "data")
    for more in (["--tokenizer", "nix"], ["--tokenizer", "bpe:60000"]):
        refused(capsys, "good.jsonl", "--out", "data", *more, "--overwrite")
        assert plain.files(tmp_path / "data") == before


@pytest.mark.parametrize(("fraction", "empty"), [("0.0001", "validation"), ("0.9999", "train")])
def test_an_empty_side_is_refused_with_a_fraction_that_works(tmp_path, capsys, fraction, empty):
    assert prepare(fraction=fraction) == 2
    error = capsys.readouterr().err
    assert f"fell to {empty}" in error
    better = error.split("--validation-fraction ")[-1].strip()
    assert not (tmp_path / "data").exists()
    assert prepare(fraction=better) == 0


def test_a_single_document_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one short text")
    assert prepare(source="a.txt") == 2
    assert "single document" in capsys.readouterr().err


def test_no_text_at_all_is_refused(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}')
    assert prepare(source="a.jsonl") == 2
    assert "hold no text" in capsys.readouterr().err


@pytest.mark.parametrize("place", [(SplitWriter, "write"), (SplitWriter, "finish_shard"), (Journal, "write")])
def test_a_full_disk_is_said(capsys, monkeypatch, place):
    def full(self, *_):
        raise OSError(28, "No space left on device")  # as the system says it, without the file

    owner, name = place
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        error = refused(capsys, "good.jsonl", "--out", "data", "--tokenizer", "bytes", "--validation-fraction", "0.2")
    assert "no space is left for data" in error
    assert prepare() == 0


def test_a_worker_that_dies_is_said(tmp_path, capsys, monkeypatch):
    broken = tmp_path / "worker.py"
    broken.write_text("import sys; sys.stdin.buffer.read(1); sys.exit(3)")
    with monkeypatch.context() as patch:
        patch.setattr("sophia.data.prepare_pool.prepare_worker.__file__", str(broken))
        error = refused(capsys, "good.jsonl", "--out", "data", "--tokenizer", "bytes", "--workers", "3")
    assert "a worker ended with exit code 3" in error
    assert prepare() == 0
