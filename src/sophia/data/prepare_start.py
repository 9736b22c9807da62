"""How a preparation starts: with a tokenizer and a journal, or from the journal of an interrupted one."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sophia.data import tokenizer as tokenizers
from sophia.data.manifest import TOKENIZER
from sophia.data.prepare_folder import clear
from sophia.data.prepare_journal import Journal
from sophia.data.prepare_worker import place
from sophia.data.recipe import Recipe
from sophia.data.shards import save_tokenizer, tokenizer_json
from sophia.data.sources import Sources


def identity_of(sources: Sources, recipe: Recipe) -> dict[str, Any]:
    """What the result depends on; a tokenizer in a file is compared by its content besides."""
    settings = asdict(recipe)
    reading = settings.pop("reading")
    listing = "\n".join("\t".join(item.identity) for item in sources.items)
    return {**settings, **reading, "sources": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()}


def begin(
    out: Path, sources: Sources, recipe: Recipe, identity: Mapping[str, Any], status: Callable[[str], None]
) -> Journal:
    """Make the tokenizer, and then the folder ours."""
    if recipe.tokenizer.startswith(tokenizers.TRAINED):
        tokenizers.vocab_size_of(recipe.tokenizer)
        status(f"training the tokenizer {recipe.tokenizer} on a sample of the text")
        training = (
            piece.text
            for piece in tokenizers.sample(sources.items, recipe.reading)
            if piece.text and place(piece.text) >= recipe.validation_fraction
        )
        tokenizer = tokenizers.train_on_sources(recipe.tokenizer, training)
        end_of_text = tokenizers.with_end_of_text(tokenizer, recipe.end_of_text, recipe.tokenizer)
    else:
        if recipe.tokenizer in tokenizers.BY_NAME:
            status(f"fetching the tokenizer {recipe.tokenizer}")
        tokenizer, end_of_text = tokenizers.load_tokenizer(recipe.tokenizer, end_of_text=recipe.end_of_text)
    clear(out)
    journal = Journal(identity=identity, end_of_text=end_of_text)
    journal.write(out)
    journal.tokenizer_sha256 = save_tokenizer(tokenizer, out)
    return journal


def refuse_changes(out: Path, journal: Journal, recipe: Recipe, identity: Mapping[str, Any]) -> None:
    """An interrupted preparation goes on only with the sources and the recipe that it began with."""
    restart = "repeat the command that began it, or start over with --overwrite"
    for name, now in identity.items():
        then = journal.identity.get(name)
        if now == then or (name, then, now) == ("invalid_utf8", "error", "replace"):
            continue  # all text so far was valid, so replacing would have changed nothing
        what = "other or changed sources" if name == "sources" else f"{name} {then!r} instead of {now!r}"
        raise ValueError(f"{out} holds an unfinished preparation of {what}; {restart}")
    if not (out / TOKENIZER).is_file():
        raise ValueError(f"{out / TOKENIZER} is gone; start over with --overwrite")
    checksums = {hashlib.sha256((out / TOKENIZER).read_bytes()).hexdigest()}
    if Path(recipe.tokenizer).exists():
        tokenizer, _ = tokenizers.load_tokenizer(recipe.tokenizer, end_of_text=recipe.end_of_text)
        checksums.add(hashlib.sha256(tokenizer_json(tokenizer)).hexdigest())
    if checksums != {journal.tokenizer_sha256}:
        raise ValueError(f"the tokenizer is not the one that the unfinished preparation in {out} began with; {restart}")
