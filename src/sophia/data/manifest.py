"""`manifest.json`: what a finished data folder holds. It is written last, so a folder with one is whole."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sophia.machine import write_json

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
JOURNAL = "unfinished.json"
"""There as long as the folder is being prepared."""
FORMAT = "sophia-data"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One finished shard."""

    name: str
    tokens: int
    documents: int
    text_bytes: int
    sha256: str
    """Of everything behind the header."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a data folder."""

    vocab_size: int
    end_of_text: int | None
    tokenizer_sha256: str
    """Of the bytes of tokenizer.json."""
    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Where the text came from and how it was cut: for people, read by nothing."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the tokenizer's and all shards' checksums, as hexadecimal: equal for equal data."""
        digest = hashlib.sha256(self.tokenizer_sha256.encode())
        for split, shards in (("train", self.train), ("validation", self.validation)):
            for shard in shards:
                digest.update(f"\n{split} {shard.tokens} {shard.sha256}".encode())
        return digest.hexdigest()

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        totals = {
            split: {"tokens": sum(s.tokens for s in shards), "documents": sum(s.documents for s in shards)}
            for split, shards in (("train", self.train), ("validation", self.validation))
        }
        write_json(
            folder / MANIFEST,
            {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, "totals": totals, **asdict(self)},
        )


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        ValueError: There is none, or it is no manifest of ours.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / JOURNAL).is_file():
            raise ValueError(f"{folder} is not finished; give the sophia prepare command that began it once more")
        reason = f"it has no {MANIFEST}" if folder.is_dir() else "there is no such folder"
        raise ValueError(
            f"{folder} is not a finished data folder ({reason}); make one with: sophia prepare SOURCE --out {folder}"
        )
    try:
        content = json.loads(path.read_bytes())
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
        manifest = Manifest(
            vocab_size=int(content["vocab_size"]),
            end_of_text=content["end_of_text"],
            tokenizer_sha256=content["tokenizer_sha256"],
            train=tuple(Shard(**shard) for shard in content["train"]),
            validation=tuple(Shard(**shard) for shard in content["validation"]),
            origin=content["origin"],
        )
        if content["fingerprint"] != manifest.fingerprint:
            raise ValueError("its fingerprint does not match its shards")
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(
            f"{path} is not a manifest that this sophia wrote or can read ({problem}); prepare the data again"
        ) from None
    return manifest
