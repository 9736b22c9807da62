"""Tokenizers: bytes."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sophia.data.tokens import BYTE_VALUES, END_OF_TEXT


def byte_tokenizer() -> Tokenizer:
    """One token a UTF-8 byte, its id the byte's value; the end-of-text token is 256."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_ids(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer


def _byte_ids() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet stands for."""
    # GPT-2's rule: printable characters of Latin-1 stand for themselves, the other bytes for 256, 257, ... in order.
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(BYTE_VALUES) if byte not in printable]
    ids = {chr(byte): byte for byte in printable} | {chr(BYTE_VALUES + i): byte for i, byte in enumerate(others)}
    assert set(ids) == set(pre_tokenizers.ByteLevel.alphabet())
    return ids
