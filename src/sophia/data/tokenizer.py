"""The tokenizer of a preparation: from a file, by name, of bytes, or trained on the spot."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sophia.data.builtin import Document
from sophia.data.documents import Piece, Reading
from sophia.data.sources import Source
from sophia.data.tokens import BYTE_VALUES, END_OF_TEXT, train_tokenizer

BYTES = "bytes"
TRAINED = "bpe:"
BY_NAME = {"gpt2": "openai-community/gpt2"}
SAMPLE_BYTES = 1 << 26
"""Text that a ``bpe:N`` tokenizer is trained on, at most."""
_SAMPLE_SOURCES = 1024
# What published tokenizers call the end of a text, most particular first.
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "<|eos|>", "</s>", "<eos>", "[EOS]")
_CHOICES = "give a tokenizer.json, a folder with vocab.json and merges.txt, bytes, or bpe:N to train one"


def load_tokenizer(name: str, *, end_of_text: str | None = None) -> tuple[Tokenizer, str]:
    """A tokenizer by what ``--tokenizer`` says, except ``bpe:N``; and its end-of-text token.

    Args:
        name: ``gpt2`` (fetched, where the machine is online), ``bytes``, a tokenizer.json, a vocab.json beside its
            merges.txt, or a folder with either.
        end_of_text: The token that ends a text, if it is none of the usual ones.

    Raises:
        ValueError: Nothing of that name, unreadable, or without an end-of-text token.
    """
    path = Path(name)
    if name == BYTES:
        tokenizer = byte_tokenizer()
    elif path.exists():
        tokenizer = _from_path(path)
        end_of_text = end_of_text or _declared_end(path if path.is_dir() else path.parent)
    elif name in BY_NAME:
        tokenizer = _from_hub(name)
    else:
        known = ", ".join((BYTES, f"{TRAINED}N", *BY_NAME))
        raise ValueError(f"tokenizer {name!r} is neither a file nor a folder nor one of {known}; {_CHOICES}")
    return tokenizer, with_end_of_text(tokenizer, end_of_text, name)


def with_end_of_text(tokenizer: Tokenizer, end_of_text: str | None, name: str) -> str:
    """Find the end-of-text token and see to it that it is a special one; also end any truncation and padding.

    Raises:
        ValueError: It has none of the usual names.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    candidates = _ENDS if end_of_text is None else (end_of_text,)
    found = next((token for token in candidates if tokenizer.token_to_id(token) is not None), None)
    if found is None:
        raise ValueError(
            f"tokenizer {name} has no token {' or '.join(candidates)} to end a text; name its own with --end-of-text"
        )
    # Only special tokens can be kept from appearing where a text spells their name.
    if not any(t.content == found and t.special for t in tokenizer.get_added_tokens_decoder().values()):
        tokenizer.add_special_tokens([AddedToken(found, special=True, normalized=False)])
    return found


def byte_tokenizer() -> Tokenizer:
    """One token a UTF-8 byte, its id the byte's value; the end-of-text token is 256."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_ids(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer


def vocab_size_of(name: str) -> int:
    """N of ``bpe:N``.

    Raises:
        ValueError: N is no number.
    """
    size = name.removeprefix(TRAINED)
    if not size.isdecimal():
        raise ValueError(f"tokenizer {name!r} has no size; write for example {TRAINED}32000")
    return int(size)


def train_on_sources(name: str, documents: Iterable[bytes]) -> Tokenizer:
    """Train the byte-level BPE that ``bpe:N`` asks for; see ``sample``.

    Raises:
        ValueError: N is no possible size, or the text holds fewer different words than N asks for.
    """
    size = vocab_size_of(name)
    tokenizer = train_tokenizer((Document("", text.decode()) for text in documents), size)
    reached = tokenizer.get_vocab_size()
    if reached < size:
        raise ValueError(f"the text gives only {reached} of the {size} entries of {name}; ask for {TRAINED}{reached}")
    return tokenizer


def sample(sources: Iterable[Source], reading: Reading, budget: int = SAMPLE_BYTES) -> Iterator[Piece]:
    """A bounded part of the text that is the same every time: beginnings of sources spread evenly over all of them.

    A source's unused share goes to those behind it, so small files do not shrink the sample.
    """
    items = [item for item in sources if item.size]
    count = min(len(items), _SAMPLE_SOURCES)
    chosen = [items[i * len(items) // count] for i in range(count)]
    for index, item in enumerate(chosen):
        share = budget // (len(chosen) - index)
        for piece in item.documents(reading):
            if len(piece.text) > share:
                break
            share -= len(piece.text)
            budget -= len(piece.text)
            yield piece


def _from_path(path: Path) -> Tokenizer:
    if path.is_dir():
        whole, vocab = path / "tokenizer.json", path / "vocab.json"
        if not whole.is_file() and not vocab.is_file():
            raise ValueError(f"{path} has no tokenizer.json and no vocab.json with merges.txt; {_CHOICES}")
        path = whole if whole.is_file() else vocab
    try:
        if path.name != "vocab.json":
            return Tokenizer.from_file(str(path))
        merges = path.parent / "merges.txt"
        if not merges.is_file():
            raise ValueError(f"there is no {merges} beside it")
        tokenizer = Tokenizer(models.BPE.from_file(str(path), str(merges)))
    except Exception as problem:  # the library raises plain Exception for whatever it finds
        raise ValueError(f"{path} cannot be read as a tokenizer ({_reason(problem)}); {_CHOICES}") from None
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - set(tokenizer.get_vocab())
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {BYTE_VALUES} bytes, so that text would be lost; "
            "it is no byte-level vocabulary like GPT-2's: give its tokenizer.json"
        )
    # GPT-2's form: words and their leading space, as bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_hub(name: str) -> Tokenizer:
    try:
        return Tokenizer.from_pretrained(BY_NAME[name])
    except Exception as problem:  # no network, no cache: each library below has its own kind
        raise ValueError(f"tokenizer {name} could not be fetched ({_reason(problem)}); offline {_CHOICES}") from None


def _reason(problem: Exception) -> str:
    return str(problem).splitlines()[0] if str(problem) else type(problem).__name__


def _declared_end(folder: Path) -> str | None:
    """The end of a text as the files beside a tokenizer.json name it."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / file
        if path.is_file():
            try:
                token = json.loads(path.read_bytes()).get("eos_token")
            except (ValueError, AttributeError):
                raise ValueError(f"{path} is no JSON object; correct or remove it") from None
            name = token.get("content") if isinstance(token, dict) else token
            if name:
                return str(name)
    return None


def _byte_ids() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet stands for."""
    # GPT-2's rule: printable characters of Latin-1 stand for themselves, the other bytes for 256, 257, ... in order.
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(BYTE_VALUES) if byte not in printable]
    ids = {chr(byte): byte for byte in printable} | {chr(BYTE_VALUES + i): byte for i, byte in enumerate(others)}
    assert set(ids) == set(pre_tokenizers.ByteLevel.alphabet())
    return ids
