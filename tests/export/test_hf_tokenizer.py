"""The tokenizer of a model folder: read in both forms, and compared with that of the data."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from sophia.hf_tokenizer import check_tokenizer, read_tokenizer, write_tokenizer
from tests.export.small import TEXT, TOKENIZERS, bpe


def write_gpt2_form(tokenizer, folder):
    """`vocab.json` and `merges.txt` as OpenAI published them."""
    content = json.loads(tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in content["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("split", [False, True])
def test_it_is_read_as_it_was_written(name, split, tmp_path):
    tokenizer = TOKENIZERS[name]()
    tokenizer.encode_special_tokens = split
    write_tokenizer(tokenizer, tmp_path, context=8, end_of_text=tokenizer.token_to_id("<|endoftext|>"))
    text = TEXT + "<|endoftext|>"
    assert read_tokenizer(tmp_path).encode(text).ids == tokenizer.encode(text).ids
    check_tokenizer(tmp_path, TOKENIZERS[name]())


def test_vocabulary_and_merges(tmp_path):
    write_gpt2_form(bpe(), tmp_path)
    assert read_tokenizer(tmp_path).encode(TEXT).ids == bpe().encode(TEXT).ids
    assert read_tokenizer(tmp_path).decode(bpe().encode(TEXT).ids) == TEXT
    check_tokenizer(tmp_path, bpe())
    with pytest.raises(
        ValueError, match=f"another tokenizer than the data .*prepare the data with --tokenizer {tmp_path}"
    ):
        check_tokenizer(tmp_path, TOKENIZERS["bytes"]())


def changed(change):
    content = json.loads(bpe().to_str())
    change(content)
    return Tokenizer.from_str(json.dumps(content))


def swap_ids(content):
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def one_more():
    tokenizer = bpe()
    tokenizer.add_special_tokens([AddedToken("<|user|>", special=True)])
    return tokenizer


def lowercase():
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def spaced():
    tokenizer = bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: changed(swap_ids), "'a' is"),
        (lambda: changed(lambda content: content["model"]["merges"].reverse()), "the merges differ"),
        (one_more, r"of 301 and 300 tokens, '<|user|>' is 300 and None"),
        (lowercase, "is cut differently"),
        (spaced, "is cut differently"),
        (TOKENIZERS["bytes"], "of 257 and 300 tokens"),
        (lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "of 1 and 300 tokens"),
    ],
)
def test_another_tokenizer_than_the_data_is_refused(other, message, tmp_path):
    write_tokenizer(bpe(), tmp_path, context=8, end_of_text=0)
    with pytest.raises(ValueError, match=message) as caught:
        check_tokenizer(tmp_path, other())
    assert str(caught.value).startswith(f"{tmp_path} has another tokenizer than the data (")
    assert str(caught.value).endswith(f"prepare the data with --tokenizer {tmp_path}")


def test_a_folder_without_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json and no vocab\.json with merges\.txt"):
        check_tokenizer(tmp_path, bpe())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_damaged_one_is_refused(name, content, tmp_path):
    write_tokenizer(bpe(), tmp_path, context=8, end_of_text=0)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name) as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
