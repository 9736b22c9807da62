"""How text becomes tokens: with the sources, all that a data folder depends on."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from sophia.data.documents import Reading
from sophia.data.shards import SHARD_TOKENS


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of a preparation that shape its result."""

    tokenizer: str = "gpt2"
    """gpt2 (fetched where online), bytes, bpe:N (trained on up to 64 MiB of the text), a tokenizer.json, or a folder
    with one or with vocab.json and merges.txt."""
    end_of_text: str | None = None
    """The token put before every document; found by itself if it has one of the usual names."""
    validation_fraction: float = 0.01
    """Share of the documents that is kept for validation, chosen by a hash of their content."""
    shard_tokens: int = SHARD_TOKENS
    """A shard is closed by the first document that reaches this many tokens."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)
    """How sources are taken apart."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it must lie between 0 and 1")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens is {self.shard_tokens}; it must be at least 1")
