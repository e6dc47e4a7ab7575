"""How rows lie in one file: the suffix says.

`.jsonl` (one JSON object a line), `.csv` (with a header line; every cell is text), `.parquet`, or `.txt`, where the
whole file is one document. Every error names the file and the line (Parquet: the row), from one.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath

from pipeline.errors import DataError, MissingLibrary
from pipeline.fields import Fields, type_of


def read_fields(path: Path, *, text_field: str) -> Iterator[tuple[str, Fields]]:
    """Each row's place and its fields; a text file's document is in the field `text_field`."""
    reader = READERS[known_suffix(path)]
    if reader is _txt:
        return ((place, {text_field: fields["text"]}) for place, fields in _txt(path))
    return reader(path)


def known_suffix(path: PurePath) -> str:
    """The suffix of a file's name, in lower case; raise DataError where nobody here reads such files."""
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(f"{path}: suffix {suffix or '(none)'} is unknown; the known ones are {', '.join(READERS)}")
    return suffix


def _jsonl(path: Path) -> Iterator[tuple[str, Fields]]:
    for number, line in _lines(path):
        if not line.strip():
            continue  # editors leave empty lines, above all at the end
        place = f"{path} line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{place}: is not JSON ({reason}); write one JSON object a line") from error
        if not isinstance(value, dict):
            raise DataError(f"{place}: holds {type_of(value)}, expected an object such as {{'text': …}}")
        yield place, value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            for line in file:
                number += 1
                yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text after line {number}; convert it to UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a readable file") from error


def _csv(path: Path) -> Iterator[tuple[str, Fields]]:
    csv.field_size_limit(2**31 - 1)  # the library's own limit, 131,072 characters, is less than a long document
    # Strict, or a quote that nobody closes would make one cell of all the rows behind it.
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
    try:
        for fields in reader:
            place = f"{path} line {reader.line_num}"
            if None in fields:
                raise DataError(f"{place}: has more cells than the header line; quote cells that hold commas")
            yield place, fields
    except csv.Error as error:
        raise DataError(f"{path}: is not CSV after line {reader.line_num} ({error}); quote the cell") from error


def _parquet(path: Path) -> Iterator[tuple[str, Fields]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingLibrary(f"{path}: Parquet needs pyarrow; run pip install 'requant[parquet]'") from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for fields in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", fields
    except (pa.ArrowException, OSError) as error:
        said = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as Parquet after row {number} ({said}); write it again") from error


def _txt(path: Path) -> Iterator[tuple[str, Fields]]:
    text = "".join(line for _, line in _lines(path))
    if text.strip():
        yield str(path), {"text": text}


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Fields]]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}
