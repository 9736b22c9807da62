"""`sophia prepare` from end to end: against the plain way, whatever the workers, batches and sources."""

import json
import random

import pytest

from sophia.cli import main
from sophia.data import prepare as pipeline
from sophia.data.shards import Dataset
from tests.data import plain

FRACTION = 0.2


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain.bpe().save("tok.json")


def write_lines(texts, name="a.jsonl"):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return name


def prepare(*arguments, out="data", tokenizer="tok.json", fraction=FRACTION):
    given = ["prepare", *arguments, "--out", out, "--tokenizer", tokenizer, "--validation-fraction", str(fraction)]
    assert main(given) == 0


def test_the_shards_are_what_the_plain_way_gives(tmp_path):
    texts = plain.texts(300)
    prepare(write_lines(texts), "--shard-tokens", "3000")
    assert plain.contents(tmp_path / "data") == plain.encode(texts, plain.bpe(), fraction=FRACTION)
    assert plain.decoded(tmp_path / "data") == sorted(texts)
    dataset = Dataset.open(tmp_path / "data")
    assert len(dataset.train.shards) > 3
    assert dataset.train.documents + dataset.validation.documents == 300
    assert dataset.train.read(0, 1).dtype == "uint16"
    assert sorted(plain.files(tmp_path / "data"))[:2] == ["manifest.json", "tokenizer.json"]
    assert not list((tmp_path / "data").glob("*unfinished*"))
    assert not list((tmp_path / "data").glob("*.partial"))


def test_bytes(tmp_path):
    texts = plain.texts(100)
    prepare(write_lines(texts), tokenizer="bytes")
    dataset = Dataset.open(tmp_path / "data")
    assert plain.contents(tmp_path / "data") == plain.encode(texts, dataset.tokenizer(), fraction=FRACTION)
    assert plain.decoded(tmp_path / "data") == sorted(texts)
    assert (dataset.vocab_size, dataset.end_of_text) == (257, 256)
    train = dataset.train
    assert train.tokens == train.text_bytes + train.documents


def test_the_result_does_not_depend_on_workers_or_batches(tmp_path, monkeypatch):
    name = write_lines(plain.texts(400))
    prepare(name, "--shard-tokens", "5000", "--workers", "1", out="one")
    monkeypatch.setattr(pipeline, "_BATCH_BYTES", 700)
    prepare(name, "--shard-tokens", "5000", "--workers", "3", out="three")
    assert plain.files(tmp_path / "one") == plain.files(tmp_path / "three")


def test_the_split_is_stable_when_documents_are_added(tmp_path):
    texts = plain.texts(200)
    prepare(write_lines(texts[:100]), out="few")
    random.Random(0).shuffle(texts)
    prepare(write_lines(texts), out="more")
    few, more = (Dataset.open(tmp_path / name) for name in ("few", "more"))

    def validation(dataset):
        split = dataset.validation
        ends = [*split.document_starts[1:].tolist(), split.tokens]
        return {tuple(split.read(int(a), b).tolist()) for a, b in zip(split.document_starts, ends, strict=True)}

    assert validation(few) < validation(more)
    added = plain.encode(plain.texts(200)[100:], plain.bpe(), fraction=FRACTION)
    assert len(validation(more)) == few.validation.documents + len(added["validation"][1])


def test_sources_are_read_in_order(tmp_path):
    texts = [f"{text}\n" for text in ("b", "a", "c")] + ["deep"]
    for name, text in zip(("in/1.txt", "in/2.md", "in/3.txt", "in/sub/0.txt"), texts, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write_lines(["line"], "z.jsonl")
    prepare("z.jsonl", "in", fraction=0.5)
    assert plain.contents(tmp_path / "data") == plain.encode(["line", *texts], plain.bpe(), fraction=0.5)


@pytest.mark.parametrize("batch", [1, 100, 10_000])
def test_a_folder_may_hold_empty_files_and_records(tmp_path, capsys, monkeypatch, batch):
    monkeypatch.setattr(pipeline, "_BATCH_BYTES", batch)
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "c.txt"):
        (tmp_path / "in" / name).touch()
    write_lines(["", *plain.texts(50), ""], "in/b.jsonl")
    prepare("in", "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["empty"] == 4
    assert result["documents"] == 50


def test_long_text_files_are_cut_and_come_back_whole(tmp_path):
    text = "\n\n".join(plain.texts(300)) + "\n"
    (tmp_path / "book.txt").write_text(text)
    prepare("book.txt", "--document-bytes", "2000")
    assert "".join(sorted(plain.decoded(tmp_path / "data"), key=text.index)) == text


def test_what_it_says(tmp_path, capsys):
    texts = plain.texts(120)
    name = write_lines(texts)
    prepare(name, "--json")
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    dataset = Dataset.open(tmp_path / "data")
    assert result["tokens"] == dataset.train.tokens + dataset.validation.tokens
    assert result["documents"] == 120
    assert result["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert result["bytes_per_token"] == result["text_bytes"] / result["tokens"]
    assert result["fingerprint"] == dataset.fingerprint
    assert result["splits"]["validation"]["tokens"] == dataset.validation.tokens
    assert result["continued"] is False
    assert result["seconds"] > 0
    prepare(name, out="again")
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("validation", "bytes a token", "sophia train --data again"))


def test_files_of_folders_that_were_passed_over_are_counted(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write_lines(plain.texts(50), "in/a.jsonl")
    for name in ("a.py", "b.py", "c.png"):
        (tmp_path / "in" / name).touch()
    prepare("in")
    assert "skipped in folders: 2 .py, 1 .png" in capsys.readouterr().out


def test_verify(tmp_path, capsys):
    prepare(write_lines(plain.texts(50)), "--shard-tokens", "1000")
    assert main(["prepare", "--verify", "data", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found[0]["sound"]
    assert found[0]["fingerprint"] == Dataset.open(tmp_path / "data").fingerprint
