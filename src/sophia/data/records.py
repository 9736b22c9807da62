"""Documents out of records that name their text: JSON lines, parquet, Hugging Face datasets."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sophia.data.blocks import read_blocks
from sophia.data.documents import BOM, INVALID_REMEDY, LONGEST_DOCUMENT, Piece, Reading, cut

_LONGEST_LINE = 1 << 26
# Rows decoded at once. Few, because a row may be a megabyte long.
_ROWS = 64
NEEDS_HF = "pip install 'sophia-lm[hf]'"


def json_documents(path: Path, reading: Reading) -> Iterator[Piece]:
    """The texts of a file with one JSON object a line; blank lines are passed over.

    Raises:
        ValueError: A line is no JSON object or has no such text field: names the file and the line.
    """
    for number, (line, position) in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            record = json.loads(line.decode(errors="strict" if reading.invalid_utf8 == "error" else "replace"))
        except UnicodeDecodeError as problem:
            raise ValueError(f"{where} is not UTF-8 (byte {problem.start + 1} of the line); {INVALID_REMEDY}") from None
        except (ValueError, RecursionError) as problem:
            raise ValueError(f"{where} is not valid JSON ({problem}); correct it or leave the file out") from None
        if not isinstance(record, dict):
            raise ValueError(
                f"{where} is not a JSON object; a line must be one object: convert arrays with jq -c '.[]'"
            )
        if reading.text_field not in record:
            raise ValueError(_no_field(where, reading, record))
        yield from _pieces(record[reading.text_field], where, reading, position)


def parquet_documents(path: Path, reading: Reading) -> Iterator[Piece]:
    """The texts of a parquet file's column.

    Raises:
        ValueError: No such column, no text in it, or damaged.
    """
    try:
        import pyarrow  # type: ignore[import-untyped]  # noqa: PLC0415 - an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ModuleNotFoundError:
        raise ValueError(f"reading {path} needs pyarrow: {NEEDS_HF}") from None
    size = path.stat().st_size
    row = 0
    try:
        # Column chunks are read page by page: without a buffer size a whole row group would be held.
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if reading.text_field not in names:
                raise ValueError(_no_field(str(path), reading, names))
            rows = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=_ROWS, columns=[reading.text_field]):
                column = batch.column(0)
                if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                    column = column.cast(pyarrow.large_binary())  # to judge its UTF-8 ourselves
                for text in column.to_pylist():
                    row += 1
                    yield from _pieces(text, f"row {row} of {path}", reading, size * row // rows)
    except (pyarrow.ArrowException, OSError) as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(f"{path} is damaged or no parquet file ({reason}); fetch it again or leave it out") from None


def dataset_documents(dataset: Any, name: str, size: int, reading: Reading) -> Iterator[Piece]:
    """The texts of an opened Hugging Face dataset, which stays on disk and counts for ``size`` bytes.

    Raises:
        ValueError: No such column, or no text in it.
    """
    if reading.text_field not in dataset.column_names:
        raise ValueError(_no_field(name, reading, dataset.column_names))
    column = dataset.select_columns([reading.text_field])
    for first in range(0, len(column), _ROWS):
        for row, text in enumerate(column[first : first + _ROWS][reading.text_field], start=first + 1):
            yield from _pieces(text, f"row {row} of {name}", reading, size * row // len(column))


def _lines(path: Path) -> Iterator[tuple[bytearray, int]]:
    rest = bytearray()
    position = 0
    first = True
    for data, position in read_blocks(path):
        rest += data.removeprefix(BOM) if first else data
        first = False
        if b"\n" in data:
            *lines, rest = rest.split(b"\n")
            for line in lines:
                yield line, position
        if len(rest) > _LONGEST_LINE:
            raise ValueError(
                f"{path} has a line longer than {_LONGEST_LINE >> 20} MiB; sophia reads one JSON object a line: "
                "convert arrays with jq -c '.[]'"
            )
    yield rest, position


def _pieces(text: Any, where: str, reading: Reading, position: int) -> Iterator[Piece]:
    """A record's text as documents; a record without text is one empty piece, so that it can be counted."""
    for part in cut(_utf8(text, where, reading), LONGEST_DOCUMENT):
        yield Piece(part, position)


def _utf8(text: Any, where: str, reading: Reading) -> bytes:
    if text is None:
        return b""
    if not isinstance(text, str | bytes):
        raise ValueError(
            f"{where} has {type(text).__name__} in field {reading.text_field!r}, not text; name another by --text-field"
        )
    try:
        if isinstance(text, str):
            return text.encode()
        text.decode()
        return text
    except UnicodeError as problem:
        if reading.invalid_utf8 == "error":
            # A string has it too: JSON can write half of a surrogate pair.
            raise ValueError(f"the text in {where} is not UTF-8 ({problem}); {INVALID_REMEDY}") from None
        if isinstance(text, str):
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        return text.decode(errors="replace").encode()


def _no_field(where: str, reading: Reading, fields: Any) -> str:
    return f"{where} has no field {reading.text_field!r}, but {', '.join(fields) or 'none'}; name one with --text-field"
