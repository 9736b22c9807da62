"""What `sophia prepare` should write, worked out the plain way; and what it did write."""

import functools
import hashlib
import random

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sophia.data.shards import Dataset

END = "<|endoftext|>"
WORDS = ["the", "curvature", "of", "a", "loss", "is", "clipped", "naïve", "木", "e\u0301", "\U0001f600", END, "12.5"]


def texts(count, *, seed=0, words=60):
    """Documents, all different, some with the end-of-text token's name in them."""
    draw = random.Random(seed)
    return [
        f"{number}\n" + " ".join(draw.choices(WORDS, k=draw.randint(1, 2 * words))) + draw.choice(["", "\n", "\n\n"])
        for number in range(count)
    ]


@functools.cache
def bpe():
    """A small byte-level BPE in GPT-2's form."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(100, seed=1), trainer)
    return tokenizer


def encode(documents, tokenizer, *, fraction, end=END):
    """{split: (tokens, where documents start, bytes of text)}, one document after the other."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    splits = {"train": ([], [], 0), "validation": ([], [], 0)}
    for text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        split = "validation" if int.from_bytes(digest[:8], "little") < fraction * 2**64 else "train"
        tokens, starts, size = splits[split]
        starts.append(len(tokens))
        tokens += [tokenizer.token_to_id(end), *plain.encode(text, add_special_tokens=False).ids]
        splits[split] = (tokens, starts, size + len(text.encode()))
    return splits


def contents(folder):
    """The same of a data folder, which is verified first."""
    dataset = Dataset.open(folder)
    dataset.verify()
    return {
        name: (split.read(0, split.tokens).tolist(), split.document_starts.tolist(), split.text_bytes)
        for name, split in (("train", dataset.train), ("validation", dataset.validation))
    }


def decoded(folder):
    """The texts of a data folder, sorted."""
    dataset = Dataset.open(folder)
    tokenizer = dataset.tokenizer()
    found = []
    for split in (dataset.train, dataset.validation):
        for first, last in zip(split.document_starts, [*split.document_starts[1:], split.tokens], strict=True):
            tokens = split.read(int(first), int(last))
            assert tokens[0] == dataset.end_of_text
            assert not np.any(tokens[1:] == dataset.end_of_text)
            found.append(tokenizer.decode(tokens[1:].tolist(), skip_special_tokens=False))
    return sorted(found)


def files(folder):
    """Name -> bytes of everything in a data folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
