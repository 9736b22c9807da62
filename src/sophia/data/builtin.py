"""Text that every machine already has: the running Python's own documentation and standard library sources.

So the demo and the tests need no network. The text differs a little between Python versions; ``fingerprint``
tells whether two machines have the same.
"""

import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# Folders of the library that are no prose and no ordinary code, or not part of it: installed packages, test
# data, tables of characters, and the documentation in its raw form (it is taken apart into topics instead).
EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idle_test",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
# Generated when Python was built: its content is the build machine's paths and flags.
EXCLUDED_PREFIX = "_sysconfigdata"


class Document(NamedTuple):
    """One text with a name that is the same on every machine."""

    name: str
    """Where it comes from: ``docs/TOPIC`` or ``lib/PATH`` with forward slashes."""
    text: str
    """The text itself."""


def builtin_documents(max_bytes: int) -> list[Document]:
    """Read documents in their fixed order until the next one would exceed ``max_bytes`` of UTF-8.

    The language reference comes first (where this Python carries it), then the library's sources by path.

    Raises:
        ValueError: The budget does not even hold the first document.
    """
    documents: list[Document] = []
    total = 0
    for document in _all_documents():
        total += len(document.text.encode())
        if total > max_bytes:
            break
        documents.append(document)
    if not documents:
        raise ValueError(
            f"max_bytes {max_bytes} holds no document; allow at least a few hundred kilobytes "
            f"(the sources are in {library_folder()})"
        )
    return documents


def fingerprint(documents: Iterable[Document]) -> str:
    """SHA-256 over names and texts, in order, as hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name.encode(), document.text.encode()):
            # The length in front keeps ("ab", "c") and ("a", "bc") apart.
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.hexdigest()


def library_folder() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _all_documents() -> Iterator[Document]:
    yield from _documentation()
    yield from _sources(library_folder())


def _documentation() -> Iterator[Document]:
    """The language reference that ``help()`` prints, one document a topic."""
    if importlib.util.find_spec("pydoc_data") is None:
        return  # some distributions ship the documentation in a package of its own
    from pydoc_data.topics import topics  # noqa: PLC0415 (half a megabyte that nothing else needs)

    for name in sorted(topics):
        yield Document(f"docs/{name}", topics[name])


def _sources(folder: Path) -> Iterator[Document]:
    """The library's Python files, sorted by their path inside it."""
    relative_paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    for relative in relative_paths:
        parts = relative.split("/")
        if EXCLUDED_FOLDERS.intersection(parts[:-1]) or parts[-1].startswith(EXCLUDED_PREFIX):
            continue
        try:
            text = (folder / relative).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a source in another encoding
        if text:
            yield Document(f"lib/{relative}", text)
