"""Interrupted preparations: nothing is lost, wrong or doubled, and nothing foreign is continued."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from sophia.cli import main
from sophia.data import prepare as pipeline
from sophia.data.prepare_folder import claimed
from sophia.data.shards import Dataset
from tests.data import plain

TEXTS = plain.texts(120)
# The command, with a journal entry after every batch, small batches, and time between them to be killed in.
DRIVER = """
import sys, time
from sophia import cli
from sophia.data import prepare, shard_writer
prepare.JOURNAL_SECONDS = 0.0
prepare._BATCH_BYTES = 1000
write = shard_writer.SplitWriter.write
def slowly(self, *arguments):
    time.sleep(0.01)
    write(self, *arguments)
shard_writer.SplitWriter.write = slowly
sys.exit(cli.main(sys.argv[1:]))
"""


class Interruption(Exception):
    """Stands for the end of the process, at a place that a test chooses."""


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "_BATCH_BYTES", 1000)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and not what is tested here
    monkeypatch.setattr(pipeline, "JOURNAL_SECONDS", 0.0)
    write_sources()


def write_sources():
    plain.bpe().save("tok.json")
    for name, texts in (("a.jsonl", TEXTS[:50]), ("b.jsonl", TEXTS[50:])):
        with open(name, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def command(*more, out="data", workers=1, tokenizer="tok.json"):
    settings = ["--validation-fraction", "0.2", "--shard-tokens", "1200", "--workers", str(workers)]
    return ["prepare", "a.jsonl", "b.jsonl", "--out", out, "--tokenizer", tokenizer, *settings, *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_sources()
        assert main(command()) == 0
    return plain.files(folder / "data")


def interrupt(monkeypatch, target, count):
    """Let the ``count``-th call of a function fail as if the process had ended before it."""
    calls = iter(range(10**9))
    owner, name = target
    real = getattr(owner, name)

    def act(*arguments, **named):
        if next(calls) == count:
            raise Interruption
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, act)
        with pytest.raises(Interruption):
            main(command())


PLACES = {
    "writing": (pipeline.SplitWriter, "write"),
    "finishing a shard": (pipeline.SplitWriter, "finish_shard"),
    "making it last": (pipeline.SplitWriter, "sync"),
    "writing the journal": (pipeline.Journal, "write"),
    "publishing shards": (pipeline.SplitWriter, "publish"),
    "writing the manifest": (pipeline.Manifest, "write"),
}


TIMES = [(place, count) for place in PLACES for count in (0, 1, 12)]


@pytest.mark.parametrize(("place", "count"), [*TIMES[:5], *TIMES[6:15], TIMES[15]])
def test_an_end_at_any_place_leaves_no_trace(monkeypatch, tmp_path, whole, place, count):
    interrupt(monkeypatch, PLACES[place], count)
    assert not (tmp_path / "data" / "manifest.json").exists()
    assert main(command()) == 0
    assert plain.files(tmp_path / "data") == whole


@pytest.mark.parametrize("leftover", ["unfinished.json.partial", "unfinished.json", "tokenizer.json"])
def test_an_end_before_the_first_document(monkeypatch, tmp_path, whole, leftover):
    with monkeypatch.context() as patch:
        patch.setattr(pipeline._Task, "run", lambda *_: (_ for _ in ()).throw(Interruption))
        with pytest.raises(Interruption):
            main(command("--validation-fraction", "0.5"))  # nothing is lost, so nothing must be the same
    if leftover != "tokenizer.json":
        (tmp_path / "data" / "tokenizer.json").unlink()
        (tmp_path / "data" / "unfinished.json").rename(tmp_path / "data" / leftover)
    assert main(command()) == 0
    assert plain.files(tmp_path / "data") == whole


def test_interrupted_again_and_again(monkeypatch, tmp_path, whole):
    draw = random.Random(0)
    for _ in range(6):
        interrupt(
            monkeypatch, PLACES[draw.choice(["writing", "making it last", "publishing shards"])], draw.randint(2, 6)
        )
    assert main(command(workers=3)) == 0
    assert plain.files(tmp_path / "data") == whole


def test_it_does_go_on(monkeypatch, tmp_path, capsys):
    """And does not simply begin again."""
    interrupt(monkeypatch, PLACES["writing"], 12)
    with pytest.raises(ValueError, match="data is not finished; give the sophia prepare command"):
        Dataset.open(tmp_path / "data")
    position = json.loads((tmp_path / "data" / "unfinished.json").read_text())
    assert position["documents"] > 5
    opened = []
    read = pipeline._Task._batches

    def counted(self):
        for tag, texts in read(self):
            opened.extend(texts)
            yield tag, texts

    monkeypatch.setattr(pipeline._Task, "_batches", counted)
    assert main(command("--json")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["continued"] is True
    done = position["documents"] + (50 if position["source"] == 1 else 0)
    assert len(opened) == len(TEXTS) - done


def test_killed_at_random_moments(tmp_path, whole):
    """kill -9, twice or more, of the real command in its own process."""
    draw = random.Random(1)
    killed = 0
    for _ in range(5):
        arguments = [sys.executable, "-c", DRIVER, *command(workers=draw.choice([1, 2]))]
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        start = wait_for_journal(process, tmp_path / "data" / "unfinished.json")
        if start:
            time.sleep(draw.random() * 0.25)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait_for_end_of_group(process.pid)  # the workers see that nobody is there
        killed += process.returncode == -signal.SIGKILL
        if killed >= 2 or (tmp_path / "data" / "manifest.json").exists():
            break
    assert killed >= 1
    if not (tmp_path / "data" / "manifest.json").exists():
        assert main(command()) == 0
    found = plain.files(tmp_path / "data")
    found.pop("unfinished.json", None)  # killed between the manifest and the end
    assert found == whole


def wait_for_journal(process, path):
    """Until this process has written something, or is over."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    while process.poll() is None:
        if path.exists() and path.stat().st_mtime_ns != before:
            return True
        time.sleep(0.005)
    return False


def wait_for_end_of_group(group):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    pytest.fail("workers are still there")


def test_ctrl_c_leaves_one_line(tmp_path, whole):
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *command()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert wait_for_journal(process, tmp_path / "data" / "unfinished.json")
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "sophia: interrupted\n"
    assert main(command()) == 0
    assert plain.files(tmp_path / "data") == whole


CHANGES = {
    "tokenizer": (["--tokenizer", "bytes"], "tokenizer 'tok.json' instead of 'bytes'"),
    "fraction": (["--validation-fraction", "0.3"], "validation_fraction 0.2 instead of 0.3"),
    "shard size": (["--shard-tokens", "1201"], "shard_tokens 1200 instead of 1201"),
    "field": (["--text-field", "body"], "text_field 'text' instead of 'body'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_settings_do_not_go_on(monkeypatch, tmp_path, capsys, change):
    interrupt(monkeypatch, PLACES["writing"], 12)
    before = plain.files(tmp_path / "data")
    arguments, words = CHANGES[change]
    assert main(command(*arguments)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "--overwrite" in error
    assert error.count("\n") == 1
    assert plain.files(tmp_path / "data") == before
    assert main(command()) == 0


def change_time(tmp_path):
    os.utime("b.jsonl", ns=(1, 1))


def add_line(tmp_path):
    with open("b.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": "more"}\n')


def change_tokenizer(tmp_path):
    tokenizer = plain.bpe()
    tokenizer.from_str(tokenizer.to_str())
    changed = json.loads((tmp_path / "tok.json").read_text())
    changed["model"]["merges"].pop()
    changed["model"]["vocab"].popitem()
    (tmp_path / "tok.json").write_text(json.dumps(changed))


@pytest.mark.parametrize("change", [change_time, add_line, change_tokenizer])
def test_other_sources_do_not_go_on(monkeypatch, tmp_path, capsys, change):
    interrupt(monkeypatch, PLACES["writing"], 12)
    before = plain.files(tmp_path / "data")
    change(tmp_path)
    assert main(command()) == 2
    error = capsys.readouterr().err
    assert "sources" in error or "tokenizer" in error
    assert "--overwrite" in error
    assert error.count("\n") == 1
    assert plain.files(tmp_path / "data") == before
    assert main(command("--overwrite")) == 0
    assert main(command(out="fresh")) == 0
    assert plain.files(tmp_path / "data") == plain.files(tmp_path / "fresh")


def test_what_is_not_utf8_can_be_passed_over_on_the_way(tmp_path, capsys):
    """The error comes late; what was done before it is not lost."""
    lines = (tmp_path / "b.jsonl").read_bytes().splitlines(keepends=True)
    lines[60] = b'{"text": "\xff"}\n'
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines))
    assert main(command()) == 2
    assert "line 61 of b.jsonl" in capsys.readouterr().err
    assert main(command("--invalid-utf8", "replace", "--json")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["continued"] is True
    texts = [*TEXTS[:110], "\ufffd", *TEXTS[111:]]
    assert plain.contents(tmp_path / "data") == plain.encode(texts, plain.bpe(), fraction=0.2)


def test_a_trained_tokenizer_is_not_trained_again(monkeypatch, tmp_path):
    def train(**more):
        return command(tokenizer="bpe:300", **more)

    assert main(train(out="whole")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(pipeline.Manifest, "write", lambda self, folder: (_ for _ in ()).throw(Interruption))
        with pytest.raises(Interruption):
            main(train())
    monkeypatch.setattr("sophia.data.tokenizer.train_on_sources", None)
    assert main(train()) == 0
    assert plain.files(tmp_path / "data") == plain.files(tmp_path / "whole")


@pytest.mark.parametrize("loss", ["train-00000.tokens", "partial", "tokenizer.json", "unfinished.json"])
def test_a_damaged_unfinished_folder_does_not_go_on(monkeypatch, tmp_path, capsys, loss):
    interrupt(monkeypatch, PLACES["writing"], 25)
    folder = tmp_path / "data"
    if loss == "partial":
        path = next(folder.glob("train-*.partial"))
        path.write_bytes(path.read_bytes()[:200])
    elif loss == "unfinished.json":
        (folder / loss).write_text("{")
    else:
        (folder / loss).unlink()
    assert main(command()) == 2
    error = capsys.readouterr().err
    assert "data" in error
    assert error.count("\n") == 1
    assert "--overwrite" in error or "another folder" in error


def test_two_at_once_are_refused(tmp_path, capsys):
    with claimed(tmp_path / "data"):
        assert main(command()) == 2
    assert "being prepared by another process" in capsys.readouterr().err
    assert main(command()) == 0
