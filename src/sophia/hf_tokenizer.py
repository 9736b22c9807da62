"""The tokenizer in a Hugging Face model folder: written there, read from there, compared with another."""

import json
from pathlib import Path

from tokenizers import Tokenizer, processors

from sophia.data.tokenizer import load_tokenizer
from sophia.data.tokens import END_OF_TEXT

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"

PROBES = (
    "The quick brown fox, he's said, jumped over 1,234 lazy dogs at 5:30 -- didn't they?",
    "def f(x):\n\tif x  is None:\n        return {'a': [1.5e-3, \"b\"]}  # why\n\n\n",
    "  leading and trailing spaces \r\n\u00a0\u3000",
    "Grüße, naïve façade; Ελληνικά, русский язык, עברית, العربية, हिन्दी, 中文，日本語。한국어 🙂👩‍👩‍👧 e\u0301 \ufffd",
    f"one{END_OF_TEXT}two {END_OF_TEXT} three",
    "\x00\x01\x7f",
    "a",
)
"""Texts on which two tokenizers are compared: words, code, space of all kinds, scripts, special tokens and
control bytes."""


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, context: int, end_of_text: int | None) -> None:
    """Write `tokenizer.json` and a `tokenizer_config.json`.

    With them `transformers.AutoTokenizer` makes of a text what training saw of it: nothing is put before or behind it.
    """
    token = None if end_of_text is None else tokenizer.id_to_token(end_of_text)
    plain = Tokenizer.from_str(tokenizer.to_str())
    if plain.num_special_tokens_to_add(is_pair=False):
        plain.post_processor = processors.ByteLevel(trim_offsets=False)  # adds nothing
    (folder / TOKENIZER).write_text(plain.to_str(pretty=True), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        # GPT-2 would add embeddings for token_type_ids, which the class's default list includes.
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": token,
        "eos_token": token,
        "clean_up_tokenization_spaces": False,
        # Whether a special token's name inside a text is text: no file of the tokenizer's own says it.
        "split_special_tokens": _reads_as_text(tokenizer, token),
    }
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def read_tokenizer(folder: Path) -> Tokenizer:
    """Load a folder's `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`.

    Raises:
        ValueError: There is neither, or they are damaged.
    """
    path = folder / TOKENIZER_CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        split = bool(values.get("split_special_tokens", False))
    except (ValueError, AttributeError) as problem:
        raise ValueError(f"{path} is damaged ({problem}): get it again") from None
    tokenizer, _ = load_tokenizer(str(folder))
    tokenizer.encode_special_tokens = split
    return tokenizer


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Check that text is tokenized alike by a model folder's tokenizer and another, as that of a data folder.

    Raises:
        ValueError: The folder has no tokenizer, its vocabulary, merges or pieces differ, or it is damaged.
    """
    claim = f"{folder} has another tokenizer than the data"
    require_equal(tokenizer, read_tokenizer(folder), claim, f"prepare the data with --tokenizer {folder}")


def require_equal(ours: Tokenizer, theirs: Tokenizer, claim: str, remedy: str) -> None:
    """Compare two tokenizers by vocabulary, merges and what they make of `PROBES`; special tokens only by their ids.

    Raises:
        ValueError: They differ: the claim, the first difference, the remedy.
    """
    difference = _difference(ours, theirs)
    if difference is not None:
        raise ValueError(f"{claim} ({difference}): {remedy}")


def _difference(ours: Tokenizer, theirs: Tokenizer) -> str | None:
    mine, other = ours.get_vocab(), theirs.get_vocab()
    if mine != other:
        token = min((token for token in {*mine, *other} if mine.get(token) != other.get(token)), key=repr)
        return f"of {len(mine)} and {len(other)} tokens, {token!r} is {mine.get(token)} and {other.get(token)}"
    if _merges(ours) != _merges(theirs):
        return "the merges differ"
    for probe in PROBES:
        if _plain(ours, probe) != _plain(theirs, probe):
            return f"{probe!r} is cut differently"
    return None


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text in which special tokens mean nothing."""
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    finally:
        tokenizer.encode_special_tokens = before


def _merges(tokenizer: Tokenizer) -> list[tuple[str, ...]]:
    merges = json.loads(tokenizer.to_str())["model"].get("merges", [])
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]


def _reads_as_text(tokenizer: Tokenizer, token: str | None) -> bool:
    if token is None:
        return bool(tokenizer.encode_special_tokens)
    return tokenizer.token_to_id(token) not in tokenizer.encode(token, add_special_tokens=False).ids
