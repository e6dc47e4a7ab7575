"""A row's fields, each taken as what it must be; raise DataError, which names the place, where it is something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import DataError

Fields = Mapping[str, Any]


def field(place: str, fields: Fields, name: str) -> Any:
    """The field's value, whatever it is."""
    if name not in fields:
        raise DataError(f"{place}: has no field {name}, found {listed(fields)}; every row needs it")
    return fields[name]


def string(place: str, fields: Fields, name: str) -> str:
    """The field's text, which may be empty."""
    value = field(place, fields, name)
    if not isinstance(value, str):
        raise DataError(f"{place}: {name} is {type_of(value)}, expected text")
    return value


def filled(place: str, fields: Fields, name: str) -> str:
    """The field's text, which says something."""
    value = string(place, fields, name)
    if not value.strip():
        raise DataError(f"{place}: {name} is empty; fill it or remove the row")
    return value


def many(place: str, fields: Fields, name: str) -> list[Any]:
    """The field's list, which holds something."""
    value = field(place, fields, name)
    if not isinstance(value, list):
        raise DataError(f"{place}: {name} is {type_of(value)}, expected a list; CSV has none, JSONL and Parquet do")
    if not value:
        raise DataError(f"{place}: {name} is empty; fill it or remove the row")
    return value


def listed(fields: Fields) -> str:
    """The names of the fields, for a sentence."""
    return ", ".join(str(name) for name in fields) or "none"


def type_of(value: Any) -> str:
    """What JSON calls a value's type."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
