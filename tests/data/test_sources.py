"""Every kind of source, in every compression, gives the same documents."""

import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from sophia.data.documents import LONGEST_DOCUMENT, Reading
from sophia.data.sources import find_sources
from tests.data.plain import texts

COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
TEXTS = texts(40)
NOWHERE = Path("nowhere")


def read(*names, without=NOWHERE, **reading):
    sources = find_sources([str(name) for name in names], without=without)
    return [piece.text.decode() for item in sources.items for piece in item.documents(Reading(**reading))]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def lines(field="text"):
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(TEXTS)).encode()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json", ".JSONL"])
def test_json_lines(tmp_path, compression, ending):
    path = tmp_path / f"a{ending}{compression}"
    path.write_bytes(COMPRESS[compression](lines()))
    assert read(path) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("ending", [".txt", ".md", "", ".log"])
def test_text(tmp_path, compression, ending):
    path = tmp_path / f"a{ending}{compression}"
    path.write_bytes(COMPRESS[compression]("\0".join(TEXTS).encode()))
    expected = [text.strip("\n") for text in TEXTS]
    assert read(path, document_separator="\0") == expected


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_parquet(tmp_path, codec, kind):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": column})
    parquet.write_table(table, tmp_path / "a.parquet", compression=codec, row_group_size=7)
    assert read("a.parquet") == TEXTS


def test_a_saved_hugging_face_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(len(TEXTS)))})
    split.save_to_disk(tmp_path / "one")
    both = datasets.DatasetDict({"train": split, "test": split.select(range(3))})
    both.save_to_disk(tmp_path / "both")
    assert read("one") == read("hf:one") == read("both") == read("hf:both:train") == TEXTS
    assert read("hf:both:test") == TEXTS[:3]
    item = find_sources(["one"], without=NOWHERE).items[0]
    positions = [piece.position for piece in item.documents(Reading())]
    assert positions == sorted(positions)
    assert positions[-1] == item.size
    with pytest.raises(ValueError, match="no split 'valid', but train, test"):
        read("hf:both:valid")
    with pytest.raises(ValueError, match="no field 'body', but text, id"):
        read("one", text_field="body")


def test_a_dataset_of_local_files_by_hugging_face(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_bytes(lines("body"))
    assert read("hf:files", text_field="body") == TEXTS


def test_builtin():
    found = read("builtin")
    assert len(found) > 100
    assert sum(map(len, found)) > 1_000_000


def test_another_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines("body"))
    assert read("a.jsonl", text_field="body") == TEXTS


def test_records_without_text_are_empty_pieces(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n  \n{"text": null}\n{"text": "x"}')
    assert read("a.jsonl") == ["", "", "x"]


def test_a_byte_order_mark_before_json(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "\\u6728"}\r\n')
    assert read("a.jsonl") == ["x", "木"]


def test_huge_records_are_cut(tmp_path):
    text = "x" * (LONGEST_DOCUMENT + 5)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "y"}))
    assert read("a.jsonl") == [text[:-5], text[-5:], "y"]


def test_a_folder_is_read_in_sorted_order_and_says_what_it_passes_over(tmp_path):
    for name in ("b/2.txt", "b/10.md", "a.jsonl", "z.txt.gz", "c.py", "d.py", "e.png", ".hidden/x.txt", "b/.x.txt"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"text": name}) if name.endswith("jsonl") else name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    (tmp_path / "in" / "out").mkdir()
    (tmp_path / "in" / "out" / "x.txt").write_text("not a source")
    assert read("in", without=tmp_path / "in" / "out") == ["a.jsonl", "z.txt.gz", "b/10.md", "b/2.txt"]
    sources = find_sources(["in"], without=tmp_path / "in" / "out")
    assert dict(sources.skipped) == {".py": 2, ".png": 1}
    assert sources.size == sum(item.size for item in sources.items)
    assert [item.name for item in sources.items] == ["in/a.jsonl", "in/z.txt.gz", "in/b/10.md", "in/b/2.txt"]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.txt").write_text("b")
    (tmp_path / "in" / "a.txt").write_text("a")
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "sub" / "link").symlink_to(tmp_path / "other")
    assert read("in") == ["a", "b"]


def test_globs_take_any_file(tmp_path):
    for name in ("x.py", "y.py", "z.txt", "sub/w.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert read("*.py") == ["x.py", "y.py"]
    assert read("**/*.py") == ["sub/w.py", "x.py", "y.py"]
    assert read("z*", "*.py") == ["z.txt", "x.py", "y.py"]  # in the order in which they were named


BAD = {
    "nothing": ([], "no source was named"),
    "no such file": (["nix.txt"], "'nix.txt': no such file or folder"),
    "no such glob": (["*.nix"], "nothing that fits it as a glob"),
    "empty file": (["empty.txt"], "empty.txt is empty"),
    "folder without text": (["pictures"], "pictures holds no text files"),
    "named twice": (["a.txt", "./a.txt"], "named twice"),
    "folder and file": (["sub", "sub/b.txt"], "named twice"),
    "compressed parquet": (["a.parquet.gz"], "compressed parquet"),
    "no such dataset": (["hf:./nowhere/at/all"], "could not be opened"),
}


@pytest.mark.parametrize("case", BAD)
def test_sources_that_cannot_be(tmp_path, case):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("text")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    names, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        find_sources(names, without=tmp_path / "out")


BAD_LINES = {
    "no field": (
        b'{"text": "x"}\n{"id": 3, "body": "x"}\n',
        r"line 2 of .*no field 'text', but id, body.*--text-field",
    ),
    "no fields": (b"{}", "but none"),
    "a number": (b'{"text": 3}', "int in field 'text'"),
    "not JSON": (b'{"text": "x"}\n{"text"\n', "line 2 of .* is not valid JSON"),
    "an array": (b'[{"text": "x"}]', "not a JSON object.*jq"),
    "an array in lines": (b'[\n{"text": "x"}\n]', "not valid JSON"),
    "nested": (b"[" * 100_000, "not valid JSON"),
    "not UTF-8": (b'{"text": "x\xff"}', r"line 1 of .* not UTF-8 \(byte 12 of the line\).*--invalid-utf8"),
    "half a surrogate": (b'{"text": "x\\ud800"}', "line 1 of .*not UTF-8.*--invalid-utf8"),
    "binary": (b"\x00\x01\x02\n", "not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_lines_that_are_no_records(tmp_path, case):
    data, words = BAD_LINES[case]
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=words) as refused:
        read("a.jsonl")
    assert "\n" not in str(refused.value)


def test_what_is_not_utf8_can_be_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x\xff"}\n{"text": "y\\ud800z\\ud83d\\ude00"}')
    assert read("a.jsonl", invalid_utf8="replace") == ["x\ufffd", "y\ufffdz\U0001f600"]


def test_a_line_too_long_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sophia.data.records._LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 2000)
    with pytest.raises(ValueError, match="a line longer than"):
        read("a.jsonl")


def test_bad_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    (tmp_path / "no.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"no.parquet is damaged or no parquet file"):
        read("no.parquet")
    parquet.write_table(pyarrow.table({"id": [1], "text": [2]}), tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match=r"row 1 of numbers.parquet has int in field 'text'"):
        read("numbers.parquet")
    with pytest.raises(ValueError, match="no field 'body', but id, text"):
        read("numbers.parquet", text_field="body")
    invalid = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": invalid}), tmp_path / "invalid.parquet")
    with pytest.raises(ValueError, match=r"row 2 of invalid.parquet is not UTF-8.*--invalid-utf8 replace"):
        read("invalid.parquet")
    assert read("invalid.parquet", invalid_utf8="replace") == ["ok", "\ufffd"]
    data = bytearray((tmp_path / "numbers.parquet").read_bytes())
    del data[len(data) // 2 :]
    (tmp_path / "cut.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"cut.parquet is damaged"):
        read("cut.parquet")


def test_missing_extras_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "a.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'sophia-lm\[hf\]'"):
        read("a.parquet")
    with pytest.raises(ValueError, match=r"needs datasets: pip install 'sophia-lm\[hf\]'"):
        read("hf:some/name")
