"""Rows of the data, read and checked: how a row's kind is told from its fields, and what each field may hold.

Every error names the file and the line (Parquet: the row), from one.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.data_files import read_fields
from pipeline.data_sources import located
from pipeline.errors import DataError
from pipeline.fields import Fields, field, filled, listed, many, string, type_of
from pipeline.row_kinds import (
    Completion,
    Conversation,
    Labelled,
    Message,
    Pair,
    Row,
    Tagged,
    Text,
    kind_of,
)
from pipeline.sections import Data, Kind
from pipeline.split import part_of, share_of

__all__ = [
    "Completion", "Conversation", "Labelled", "Message", "Pair", "Row", "Tagged", "Text", "check_rows", "kind_of",
    "lacks_chat_template", "read_rows",
]  # fmt: skip

ROLES = ("system", "developer", "user", "assistant", "tool")
# The words that Stanford's Alpaca was trained with, and every data set of that shape since.
_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:"
)


def read_rows(data: Data) -> Iterator[Row]:
    """Every row of `data.part`, one at a time; raise DataError at the first that is wrong, and where there is none."""
    read = taken = 0
    for row in _all_rows(data):
        read += 1
        if _is_taken(row, data):
            taken += 1
            yield row
    _require(data, read, taken)


def check_rows(data: Data, *, limit: int | None) -> Kind:
    """The kind of the first `limit` rows (None: all), of whatever part, each of them checked.

    Raise DataError where one is wrong, or where they are all there is and none of them belongs to `data.part`.
    """
    kind: Kind = "text"
    read = taken = 0
    for row in itertools.islice(_all_rows(data), limit):
        kind = kind_of(row)
        read += 1
        taken += _is_taken(row, data)
    if limit is None or read < limit:
        _require(data, read, taken)
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


def _all_rows(data: Data) -> Iterator[Row]:
    """Every row of every file; all of one kind, and their labels of one type."""
    kind: Kind | None = None if data.format == "auto" else data.format
    first_place, first_type = "", None
    for path in located(data):
        for number, (place, fields) in enumerate(read_fields(path, text_field=data.field)):
            if data.format == "auto" and number == 0:
                found = _kind_of_fields(place, fields, data)
                if kind not in {None, found}:
                    raise DataError(
                        f"{place}: is {found}, where {first_place} is {kind}; keep rows of one kind together"
                    )
                kind = found
            assert kind
            row = _PARSERS[kind](place, fields, data)
            type_ = _label_type(kind, fields, data)
            if first_place and type_ != first_type:
                raise DataError(f"{place}: its label is {type_}, where {first_place} has {first_type}; write all alike")
            first_place, first_type = first_place or place, type_
            yield row


def _is_taken(row: Row, data: Data) -> bool:
    if not (data.held_out or data.validation):
        return data.part == "train"
    content = asdict(row)
    del content["place"]
    if kind_of(row) == "classification":
        content["label"] = str(content["label"])  # the same row in CSV and in JSON
    return part_of(content, data) == data.part


def _require(data: Data, read: int, taken: int) -> None:
    if not read:
        raise DataError(f"{data.path}: holds no rows; name a file with at least one")
    if not taken:
        raise DataError(
            f"{data.path}: none of its {read} rows belongs to the part {data.part}, whose share is "
            f"{share_of(data):g}; give more rows, or set data.held_out and data.validation otherwise"
        )


def _kind_of_fields(place: str, fields: Fields, data: Data) -> Kind:
    for kind, names in _SIGNS.items():
        if all(name in fields for name in names):
            return kind
    if data.field in fields:
        if data.label in fields:
            return "regression" if isinstance(fields[data.label], float) else "classification"
        return "text"
    raise DataError(
        f"{place}: has the fields {listed(fields)}, expected messages, prompt and completion, instruction and output, "
        f"anchor and positive, tokens and tags, or {data.field}; name the text's field with data.field"
    )


def _text(place: str, fields: Fields, data: Data) -> Text:
    return Text(place=place, text=string(place, fields, data.field))


def _conversation(place: str, fields: Fields, _: Data) -> Conversation:
    messages = field(place, fields, "messages")
    if not isinstance(messages, list):
        raise DataError(f"{place}: messages is {type_of(messages)}, expected a list of objects with role and content")
    if not messages:
        raise DataError(f"{place}: messages is empty; give at least a user's and an assistant's turn")
    turns = tuple(_message(f"{place}, message {i}", message) for i, message in enumerate(messages, start=1))
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{place}: no turn is the assistant's, so there is nothing to learn; add one")
    return Conversation(place=place, messages=turns)


def _message(place: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{place}: is {type_of(message)}, expected an object with role and content")
    role = string(place, message, "role")
    if role not in ROLES:
        raise DataError(f"{place}: role is {role!r}, expected one of {', '.join(ROLES)}")
    return Message(role=role, content=string(place, message, "content"))


def _completion(place: str, fields: Fields, _: Data) -> Completion:
    prompt, completion = string(place, fields, "prompt"), string(place, fields, "completion")
    if not completion:
        raise DataError(f"{place}: completion is empty, so there is nothing to learn; fill it or remove the row")
    return Completion(place=place, prompt=prompt, completion=completion)


def _alpaca(place: str, fields: Fields, _: Data) -> Completion:
    instruction, output = filled(place, fields, "instruction"), filled(place, fields, "output")
    given = string(place, fields, "input") if fields.get("input") is not None else ""
    prompt = _ALPACA.format(
        instruction=instruction,
        more=", paired with an input that provides further context" if given else "",
        input=f"### Input:\n{given}\n\n" if given else "",
    )
    return Completion(place=place, prompt=prompt, completion=output)


def _classified(place: str, fields: Fields, data: Data) -> Labelled:
    label = field(place, fields, data.label)
    if isinstance(label, str):
        label = filled(place, fields, data.label)
    elif not isinstance(label, (int, bool)):
        found = f"the number {label}" if isinstance(label, float) else type_of(label)
        raise DataError(
            f"{place}: {data.label} is {found}, expected text, a whole number or true/false; "
            "set data.format to regression where labels are measured"
        )
    return Labelled(place=place, text=filled(place, fields, data.field), label=label)


def _measured(place: str, fields: Fields, data: Data) -> Labelled:
    value = field(place, fields, data.label)
    try:
        label = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        label = math.nan
    if not math.isfinite(label):
        found = repr(value) if isinstance(value, (str, float)) else type_of(value)
        raise DataError(f"{place}: {data.label} is {found}, expected a finite number; correct it or remove the row")
    return Labelled(place=place, text=filled(place, fields, data.field), label=label)


def _tagged(place: str, fields: Fields, _: Data) -> Tagged:
    tokens, tags = many(place, fields, "tokens"), many(place, fields, "tags")
    if len(tokens) != len(tags):
        raise DataError(f"{place}: has {len(tokens)} tokens but {len(tags)} tags; give each token one")
    for number, (token, tag) in enumerate(zip(tokens, tags, strict=True), start=1):
        if not isinstance(token, str) or not token.strip():
            raise DataError(f"{place}: token {number} is {token!r}, expected text that is not empty; remove it")
        if type(tag) is not type(tags[0]) or type(tag) not in {str, int} or tag == "":
            raise DataError(f"{place}: tag {number} is {tag!r}, expected text, or whole numbers throughout; correct it")
    return Tagged(place=place, tokens=tuple(tokens), tags=tuple(str(tag) for tag in tags))


def _pair(place: str, fields: Fields, _: Data) -> Pair:
    # A missing cell of a CSV is empty, a missing value of Parquet null.
    negative = fields.get("negative")
    if negative is not None and negative != "":
        negative = filled(place, fields, "negative")
    anchor, positive = filled(place, fields, "anchor"), filled(place, fields, "positive")
    return Pair(place=place, anchor=anchor, positive=positive, negative=negative or None)


def _label_type(kind: Kind, fields: Fields, data: Data) -> str | None:
    """What type the row's label has, where it has one."""
    if kind == "tagged":
        return type_of(fields["tags"][0])
    return type_of(fields[data.label]) if kind in {"classification", "regression"} else None


# Fields that a kind is known by; the first kind whose fields a row has is the row's.
_SIGNS: dict[Kind, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "pairs": ("anchor", "positive"),
    "tagged": ("tokens", "tags"),
}
_PARSERS: dict[Kind, Callable[[str, Fields, Data], Row]] = {
    "text": _text,
    "messages": _conversation,
    "prompt_completion": _completion,
    "alpaca": _alpaca,
    "classification": _classified,
    "regression": _measured,
    "tagged": _tagged,
    "pairs": _pair,
}
