"""From text to batches: a byte-level BPE trained on the spot, one array of token ids, random windows of it."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from sophia.data.builtin import Document

Tokens = npt.NDArray[np.uint16]

END_OF_TEXT = "<|endoftext|>"
BYTE_VALUES = 256


def split_documents(documents: Iterable[Document], validation_fraction: float) -> tuple[list[Document], list[Document]]:
    """Divide documents into training and validation; no document is in both.

    A document's name alone decides, so adding others never moves it from one side to the other.

    Raises:
        ValueError: The fraction is not inside (0, 1), or one side would be empty.
    """
    if not 0.0 < validation_fraction < 1.0:
        raise ValueError(f"validation_fraction is {validation_fraction}; it must lie between 0 and 1")
    train: list[Document] = []
    validation: list[Document] = []
    for document in documents:
        place = int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "little") / 2**64
        (validation if place < validation_fraction else train).append(document)
    if not train or not validation:
        raise ValueError(
            f"{len(train)} training and {len(validation)} validation documents at a validation_fraction of "
            f"{validation_fraction}; both sides need some: give more documents or another fraction"
        )
    return train, validation


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE with ``vocab_size`` entries: any text can be encoded and comes back exact.

    Raises:
        ValueError: ``vocab_size`` leaves no room for all bytes and the end-of-text token, or does not fit uint16.
    """
    smallest = BYTE_VALUES + 1
    if not smallest <= vocab_size <= np.iinfo(np.uint16).max + 1:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be at least {smallest} (all bytes and the end-of-text token) "
            "and at most 65536"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Sequence[Document]) -> Tokens:
    """Join the documents' token ids, an end-of-text token before each: uint16 [number of tokens]."""
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    assert end_of_text is not None  # `train_tokenizer` makes it a special token
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([document.text for document in documents]):
        ids.append(end_of_text)
        ids.extend(encoding.ids)
    return np.array(ids, dtype=np.uint16)


def batch(tokens: Tokens, *, seed: int, step: int, batch_size: int, context: int) -> tuple[Tensor, Tensor]:
    """Random windows of the text and, for each position, the token that follows it.

    A pure function of ``(seed, step)``: whoever asks, in whatever order, gets the same windows.

    Returns:
        Inputs and targets, both int64 [batch_size, context]; targets are the inputs one token later.

    Raises:
        ValueError: The text is shorter than one window.
    """
    choices = len(tokens) - context
    if choices < 1:
        raise ValueError(
            f"{len(tokens)} tokens hold no window of {context} and its targets; give more text or a shorter context"
        )
    # numpy promises the raw stream of a bit generator for all its versions, but not what `integers` makes of it.
    # The modulo's bias is below 2**-40 for any text that fits into memory.
    draws = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(batch_size)
    return _windows(tokens, draws % np.uint64(choices), context)


def validation_batches(tokens: Tokens, *, windows: int, batch_size: int, context: int) -> list[tuple[Tensor, Tensor]]:
    """Windows spread evenly over the text, always the same, in pairs shaped as ``batch`` gives them.

    ``windows`` is rounded up to whole batches, so that every batch weighs the same in a mean of means.

    Raises:
        ValueError: The text has fewer tokens than the windows together.
    """
    batches = -(-windows // batch_size)
    windows = batches * batch_size
    if len(tokens) < windows * context + 1:
        raise ValueError(
            f"{len(tokens)} validation tokens do not fill {windows} windows of {context}; "
            "give more text, or ask for fewer windows"
        )
    starts = np.linspace(0, len(tokens) - context - 1, windows).astype(np.uint64)
    return [_windows(tokens, rows, context) for rows in np.split(starts, batches)]


def _windows(tokens: Tokens, starts: npt.NDArray[np.uint64], context: int) -> tuple[Tensor, Tensor]:
    rows = starts.astype(np.int64)[:, None] + np.arange(context + 1)  # [batch, context + 1]
    windows = torch.from_numpy(tokens[rows].astype(np.int64))
    return windows[:, :-1], windows[:, 1:]
