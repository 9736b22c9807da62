"""Tokenizers by every way to name one: the data folder holds it as a file, and its texts come back."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from sophia.cli import main
from sophia.data.documents import Reading
from sophia.data.shards import Dataset
from sophia.data.sources import find_sources
from sophia.data.tokenizer import byte_tokenizer, load_tokenizer, sample, with_end_of_text
from tests.data import plain

TEXTS = plain.texts(120)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("a.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in TEXTS)


def prepare(tokenizer, *more, out="data"):
    return main(
        ["prepare", "a.jsonl", "--out", out, "--tokenizer", str(tokenizer), "--validation-fraction", "0.2", *more]
    )


def gpt2_form(folder, tokenizer=None):
    """vocab.json and merges.txt as GPT-2's are published."""
    folder.mkdir(exist_ok=True)
    content = json.loads((tokenizer or plain.bpe()).to_str())
    vocab = dict(content["model"]["vocab"]) | {token["content"]: token["id"] for token in content["added_tokens"]}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "".join(" ".join(pair) + "\n" for pair in content["model"]["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    return folder


@pytest.mark.parametrize("form", ["file", "folder", "vocab folder", "vocab file", "hf folder"])
def test_every_form_of_one_tokenizer_gives_the_same_tokens(tmp_path, form):
    if form.startswith("vocab"):
        name = gpt2_form(tmp_path / "tok")
        name = name / "vocab.json" if form == "vocab file" else name
    else:
        name = tmp_path / "tok"
        name.mkdir()
        plain.bpe().save(str(name / "tokenizer.json"))
        if form == "hf folder":
            (name / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": plain.END}}))
        name = name / "tokenizer.json" if form == "file" else name
    assert prepare(name) == 0
    assert plain.contents(tmp_path / "data") == plain.encode(TEXTS, plain.bpe(), fraction=0.2)
    assert plain.decoded(tmp_path / "data") == sorted(TEXTS)
    stored = Tokenizer.from_file(str(tmp_path / "data" / "tokenizer.json"))
    assert stored.encode("the curvature").ids == plain.bpe().encode("the curvature").ids
    assert stored.token_to_id(plain.END) == Dataset.open(tmp_path / "data").end_of_text


def test_gpt2_by_name(tmp_path, monkeypatch):
    """With what the network would give; whether it is there cannot be tested offline."""
    asked = []

    class Online:
        @staticmethod
        def from_pretrained(name):
            asked.append(name)
            return plain.bpe()

    monkeypatch.setattr("sophia.data.tokenizer.Tokenizer", Online)
    assert prepare("gpt2") == 0
    assert asked == ["openai-community/gpt2"]
    assert plain.contents(tmp_path / "data") == plain.encode(TEXTS, plain.bpe(), fraction=0.2)


def test_gpt2_offline_says_what_to_give_instead(monkeypatch, capsys, tmp_path):
    class Offline:
        @staticmethod
        def from_pretrained(name):
            raise Exception("no route to host\nand more")

    monkeypatch.setattr("sophia.data.tokenizer.Tokenizer", Offline)
    assert prepare("gpt2") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in ("gpt2", "no route to host", "vocab.json", "merges.txt", "bpe:N"))
    assert not (tmp_path / "data").exists()


def test_a_trained_tokenizer(tmp_path):
    assert prepare("bpe:300") == 0
    assert prepare("bpe:300", "--workers", "1", out="again") == 0
    assert plain.files(tmp_path / "data") == plain.files(tmp_path / "again")
    dataset = Dataset.open(tmp_path / "data")
    assert dataset.vocab_size == 300
    assert plain.contents(tmp_path / "data") == plain.encode(TEXTS, dataset.tokenizer(), fraction=0.2)
    assert plain.decoded(tmp_path / "data") == sorted(TEXTS)


def test_it_is_not_trained_on_validation_documents(tmp_path, monkeypatch):
    seen = []
    from sophia.data import tokenizer

    train = tokenizer.train_on_sources
    monkeypatch.setattr(tokenizer, "train_on_sources", lambda name, texts: train(name, watch(texts)))

    def watch(texts):
        for text in texts:
            seen.append(text.decode())
            yield text

    assert prepare("bpe:300") == 0
    assert len(seen) == Dataset.open(tmp_path / "data").train.documents
    assert len(seen) < len(TEXTS)


def test_the_sample_is_bounded_and_spread(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for i in range(10):
        (tmp_path / "in" / f"{i}.txt").write_text(f"{i}" * (50 if i < 5 else 4000))
    items = find_sources(["in"], without=tmp_path / "data").items
    pieces = [piece.text for piece in sample(items, Reading(document_bytes=100), budget=10_000)]
    found = {i: sum(len(text) for text in pieces if text.startswith(b"%d" % i)) for i in range(10)}
    assert sum(map(len, pieces)) <= 10_000
    assert all(found[i] == 50 for i in range(5))  # whole
    assert all(1500 <= found[i] <= 2000 for i in range(5, 10))  # what they leave goes to the others
    monkeypatch.setattr("sophia.data.tokenizer._SAMPLE_SOURCES", 5)
    some = [piece.text for piece in sample(items, Reading(document_bytes=100), budget=10**6)]
    assert {text[:1] for text in some} == {b"0", b"2", b"4", b"6", b"8"}
    assert list(sample([], Reading())) == []
    monkeypatch.setattr("sophia.data.tokenizer._SAMPLE_SOURCES", 1024)
    everything = [piece.text for piece in sample(items, Reading(document_bytes=100), budget=10**6)]
    assert len(b"".join(everything)) == sum(item.size for item in items)


def word_level(*, without=()):
    words = sorted({word for text in TEXTS for word in text.split() if word not in without})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_the_end_of_text_is_found_under_its_usual_names(tmp_path):
    for name in ("</s>", "<|end_of_text|>", "[EOS]"):
        tokenizer = byte_tokenizer()
        content = tokenizer.to_str().replace("<|endoftext|>", name)
        assert with_end_of_text(Tokenizer.from_str(content), None, "x") == name


def test_the_end_of_text_that_a_folder_declares_wins(tmp_path):
    tokenizer = plain.bpe()
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens([AddedToken("<stop>", special=True)])
    (tmp_path / "tok").mkdir()
    tokenizer.save("tok/tokenizer.json")
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<stop>"}))
    assert prepare("tok") == 0
    dataset = Dataset.open(tmp_path / "data")
    assert dataset.end_of_text == tokenizer.token_to_id("<stop>")
    assert plain.contents(tmp_path / "data") == plain.encode(TEXTS, tokenizer, fraction=0.2, end="<stop>")
    assert prepare("tok", "--end-of-text", plain.END, out="other") == 0
    assert Dataset.open(tmp_path / "other").end_of_text == tokenizer.token_to_id(plain.END)


@pytest.mark.parametrize("kind", ["plain entry", "added but not special"])
def test_the_name_of_the_end_of_text_in_a_text_is_text(tmp_path, kind):
    """Even where the tokenizer does not call it special."""
    assert any(plain.END in text for text in TEXTS)
    content = json.loads(plain.bpe().to_str())
    if kind == "plain entry":
        content["model"]["vocab"][plain.END] = content["added_tokens"][0]["id"]
        content["added_tokens"] = []
    else:
        content["added_tokens"][0]["special"] = False
    (tmp_path / "tok.json").write_text(json.dumps(content))
    assert prepare("tok.json") == 0
    assert plain.contents(tmp_path / "data") == plain.encode(TEXTS, plain.bpe(), fraction=0.2)


def test_truncation_padding_and_templates_of_the_file_are_not_applied(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.from_str(plain.bpe().to_str())
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=512, pad_id=0, pad_token=plain.END)
    tokenizer.post_processor = TemplateProcessing(single=f"{plain.END} $A", special_tokens=[(plain.END, 0)])
    tokenizer.save("tok.json")
    assert prepare("tok.json") == 0
    assert plain.contents(tmp_path / "data") == plain.encode(TEXTS, plain.bpe(), fraction=0.2)


def test_a_vocabulary_with_gaps_and_over_65536_takes_32_bits(tmp_path):
    content = json.loads(plain.bpe().to_str())
    content["model"]["vocab"] |= {f"never {i}": i for i in range(1000, 70_000, 3)}
    (tmp_path / "tok.json").write_text(json.dumps(content))
    assert prepare("tok.json") == 0
    dataset = Dataset.open(tmp_path / "data")
    assert dataset.vocab_size == 69_998  # one more than the largest id
    assert dataset.train.read(0, 2).dtype == "uint32"
    assert plain.contents(tmp_path / "data") == plain.encode(TEXTS, plain.bpe(), fraction=0.2)


def test_a_tokenizer_that_cannot_encode_the_text_is_said(tmp_path, capsys):
    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save("tok.json")
    assert prepare("tok.json") == 2
    error = capsys.readouterr().err
    assert "the tokenizer cannot encode" in error
    assert error.count("\n") == 1


def test_an_end_of_text_that_texts_contain_is_refused(tmp_path, capsys):
    """A word of the text as the end: documents would fall apart."""
    word_level().save("tok.json")
    assert prepare("tok.json", "--end-of-text", "loss") == 2
    error = capsys.readouterr().err
    assert "end-of-text" in error
    assert "--end-of-text" in error


BAD = {
    "no such name": ("gpt-2", ["'gpt-2'", "bytes", "bpe:N"]),
    "an empty folder": ("empty", ["no tokenizer.json", "vocab.json"]),
    "no tokenizer": ("a.jsonl", ["cannot be read as a tokenizer"]),
    "no merges": ("alone", ["merges.txt"]),
    "no byte-level vocabulary": ("words", ["256 bytes"]),
    "no end of text": ("noend.json", ["no token", "--end-of-text"]),
    "a size that is none": ("bpe:many", ["bpe:many", "bpe:32000"]),
    "too small": ("bpe:100", ["100", "257"]),
    "too large": ("bpe:70000", ["70000", "65536"]),
    "more than the text gives": ("bpe:60000", ["60000", "ask for bpe:"]),
}


@pytest.mark.parametrize("case", BAD)
def test_tokenizers_that_cannot_be(tmp_path, capsys, case):
    name, words = BAD[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "vocab.json").write_text("{}")
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "words" / "merges.txt").write_text("#version: 0.2\na b\n")
    word_level(without=(plain.END,)).save("noend.json")
    assert prepare(name) == 2
    error = capsys.readouterr().err
    assert error.startswith("sophia: ")
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not (tmp_path / "data").exists()


def test_the_named_end_must_exist(tmp_path, capsys):
    plain.bpe().save("tok.json")
    assert prepare("tok.json", "--end-of-text", "<nix>") == 2
    assert "no token <nix>" in capsys.readouterr().err
    assert load_tokenizer("tok.json", end_of_text=plain.END)[1] == plain.END
