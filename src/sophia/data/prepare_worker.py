"""A worker of `sophia prepare`: a program that turns documents from its standard input into tokens on its output.

It is started by its path, so that it imports the tokenizer library alone: with torch in it, it would take ten times
the memory and start ten times slower. Both directions are pickles, and the other end is our own process.
"""

import hashlib
import pickle
import signal
import sys
from array import array
from pathlib import Path
from typing import Any, BinaryIO


def place(text: bytes) -> float:
    """Where a document falls between 0 and 1, by its content alone; below the validation fraction it is validation."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") / 2**64


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the requests end: first the settings, then lists of documents."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - not for those who only need `place`

    settings = pickle.load(requests)
    tokenizer = Tokenizer.from_file(settings["tokenizer"])
    # A text that spells a special token's name means those characters.
    tokenizer.encode_special_tokens = True
    while True:
        try:
            texts = pickle.load(requests)
        except (EOFError, pickle.UnpicklingError):  # the other end is gone, perhaps in the middle of a request
            return
        try:
            answer: Any = encode(tokenizer, texts, settings)
        except Exception as problem:  # whatever the tokenizer cannot do; the other process tells the user
            answer = str(problem)
        pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


def encode(tokenizer: Any, texts: list[bytes], settings: dict[str, Any]) -> dict[str, Any]:
    """Encode documents: for each split its tokens as bytes, the documents' lengths, and the sizes of their texts."""
    end_of_text = settings["end_of_text"]
    splits: dict[str, Any] = {split: (array(settings["typecode"]), [], []) for split in ("train", "validation")}
    places = [place(text) for text in texts]
    for text, where in zip(texts, places, strict=True):
        tokens, lengths, sizes = splits["validation" if where < settings["validation_fraction"] else "train"]
        if settings["bytes"]:
            ids = list(text)
        else:
            # One at a time: while it works the library needs a hundred times the text's memory.
            ids = tokenizer.encode_batch_fast([text.decode()], add_special_tokens=False)[0].ids
        tokens.append(end_of_text)
        tokens.extend(ids)
        lengths.append(len(ids) + 1)
        sizes.append(len(text))
    answer = {split: (tokens.tobytes(), lengths, sizes) for split, (tokens, lengths, sizes) in splits.items()}
    return {**answer, "lowest": min(places), "highest": max(places)}


if __name__ == "__main__":
    # Modules here must not stand in for others of their name.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the other process decides
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # if it is killed there is nobody to complain to
    serve(sys.stdin.buffer, sys.stdout.buffer)
