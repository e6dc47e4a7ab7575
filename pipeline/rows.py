"""Rows of a data file, read and checked: documents, conversations, or prompts with completions.

The suffix says how a file lies on disk: `.jsonl` (one JSON object a line), `.csv` (with a header line), `.parquet`, or
`.txt`, where the whole file is one document. Every error names the file and the line (Parquet: the row), from one.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import DataError, MissingLibrary
from pipeline.row_kinds import Completion, Conversation, Labelled, Message, Pair, Row, Tagged, Text, kind_of
from pipeline.sections import Data, Kind

__all__ = [
    "Completion", "Conversation", "Labelled", "Message", "Pair", "Row", "Tagged", "Text", "check_rows", "kind_of",
    "lacks_chat_template", "read_rows",
]  # fmt: skip

ROLES = ("system", "developer", "user", "assistant", "tool")


Fields = Mapping[str, Any]


def read_rows(data: Data) -> Iterator[Row]:
    """Every row of the file, one at a time; raise DataError at the first that is wrong, and for a file without rows."""
    path = Path(data.path)
    read = _reader(path)
    found = False
    kind: Kind | None = None if data.format == "auto" else data.format
    for place, fields in read(path, data):
        found = True
        kind = kind or _kind_of(place, fields, data)
        yield _PARSERS[kind](place, fields, data)
    if not found:
        raise DataError(f"{path}: holds no rows; name a file with at least one")


def check_rows(data: Data, *, limit: int | None) -> Kind:
    """Check the first `limit` rows (None: all) and say what they are; raise DataError where one is wrong."""
    kind: Kind = "text"
    for row in itertools.islice(read_rows(data), limit):
        kind = kind_of(row)
    return kind


def lacks_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in `folder` has no chat template, in its config or in a file of its own."""
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return False
    if any((folder / "chat_templates").glob("*.jinja")):
        return False
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return not (isinstance(config, dict) and config.get("chat_template"))


def _reader(path: Path) -> Callable[[Path, Data], Iterator[tuple[str, Fields]]]:
    if not path.exists():
        raise DataError(f"{path}: no such file; name a JSONL, CSV, Parquet or text file")
    if not path.is_file():
        raise DataError(f"{path}: is a folder; name one file of rows")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: suffix {path.suffix or '(none)'} is unknown; the known ones are {', '.join(READERS)}")
    return reader


def _jsonl(path: Path, _: Data) -> Iterator[tuple[str, Fields]]:
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
            raise DataError(f"{place}: holds {_name(value)}, expected an object such as {{'text': …}}")
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


def _csv(path: Path, _: Data) -> Iterator[tuple[str, Fields]]:
    csv.field_size_limit(2**31 - 1)  # the library's own limit, 131,072 characters, is less than a long document
    reader = csv.DictReader(line for _, line in _lines(path))
    try:
        for fields in reader:
            place = f"{path} line {reader.line_num}"
            if None in fields:
                raise DataError(f"{place}: has more cells than the header line; quote cells that hold commas")
            yield place, fields
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: is not CSV ({error}); quote the cell") from error


def _parquet(path: Path, _: Data) -> Iterator[tuple[str, Fields]]:
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


def _txt(path: Path, data: Data) -> Iterator[tuple[str, Fields]]:
    text = "".join(line for _, line in _lines(path))
    if text.strip():
        yield str(path), {data.field: text}


READERS: dict[str, Callable[[Path, Data], Iterator[tuple[str, Fields]]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}


def _kind_of(place: str, fields: Fields, data: Data) -> Kind:
    if "messages" in fields:
        return "messages"
    if "prompt" in fields and "completion" in fields:
        return "prompt_completion"
    if "anchor" in fields:
        return "pairs"
    if "tags" in fields:
        return "tagged"
    if data.field in fields:
        if data.label in fields:
            return "regression" if isinstance(fields[data.label], float) else "classification"
        return "text"
    raise DataError(
        f"{place}: has the fields {_listed(fields)}, expected messages, prompt and completion, or {data.field}; "
        "name the text's field with data.field"
    )


def _text(place: str, fields: Fields, data: Data) -> Text:
    return Text(place=place, text=_string(place, fields, data.field))


def _conversation(place: str, fields: Fields, _: Data) -> Conversation:
    messages = _field(place, fields, "messages")
    if not isinstance(messages, list):
        raise DataError(f"{place}: messages is {_name(messages)}, expected a list of objects with role and content")
    if not messages:
        raise DataError(f"{place}: messages is empty; give at least a user's and an assistant's turn")
    turns = tuple(_message(f"{place}, message {i}", message) for i, message in enumerate(messages, start=1))
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{place}: no turn is the assistant's, so there is nothing to learn; add one")
    return Conversation(place=place, messages=turns)


def _message(place: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{place}: is {_name(message)}, expected an object with role and content")
    role = _string(place, message, "role")
    if role not in ROLES:
        raise DataError(f"{place}: role is {role!r}, expected one of {', '.join(ROLES)}")
    return Message(role=role, content=_string(place, message, "content"))


def _completion(place: str, fields: Fields, _: Data) -> Completion:
    prompt, completion = _string(place, fields, "prompt"), _string(place, fields, "completion")
    if not completion:
        raise DataError(f"{place}: completion is empty, so there is nothing to learn; fill it or remove the row")
    return Completion(place=place, prompt=prompt, completion=completion)


def _classified(place: str, fields: Fields, data: Data) -> Labelled:
    return Labelled(place=place, text=_string(place, fields, data.field), label=_field(place, fields, data.label))


def _measured(place: str, fields: Fields, data: Data) -> Labelled:
    label = float(_field(place, fields, data.label))
    return Labelled(place=place, text=_string(place, fields, data.field), label=label)


def _tagged(place: str, fields: Fields, _: Data) -> Tagged:
    tokens, tags = tuple(_field(place, fields, "tokens")), tuple(map(str, _field(place, fields, "tags")))
    return Tagged(place=place, tokens=tokens, tags=tags)


def _pair(place: str, fields: Fields, _: Data) -> Pair:
    anchor, positive = _string(place, fields, "anchor"), _string(place, fields, "positive")
    return Pair(place=place, anchor=anchor, positive=positive, negative=fields.get("negative"))


_PARSERS: dict[Kind, Callable[[str, Fields, Data], Row]] = {
    "text": _text,
    "messages": _conversation,
    "prompt_completion": _completion,
    "classification": _classified,
    "regression": _measured,
    "tagged": _tagged,
    "pairs": _pair,
}


def _field(place: str, fields: Fields, name: str) -> Any:
    if name not in fields:
        raise DataError(f"{place}: has no field {name}, found {_listed(fields)}; every row needs it")
    return fields[name]


def _string(place: str, fields: Fields, name: str) -> str:
    value = _field(place, fields, name)
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} is {_name(value)}, expected text")
    return value


def _listed(fields: Fields) -> str:
    return ", ".join(str(name) for name in fields) or "none"


def _name(value: Any) -> str:
    """What JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
