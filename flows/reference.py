"""The recipe's reference page, written from the models that parse it."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from pipeline.recipe import Recipe
from pipeline.section import Section
from pipeline.targets import AWQTarget, BitsAndBytesTarget, CompressedTensorsTarget, GGUFTarget, GPTQTarget

HEADING = """\
# The recipe

Written from the models that parse it: `requant schema --reference` prints this page, `requant schema` the JSON Schema
for editors.
Unknown keys are errors that name the nearest valid one. Paths are relative to where `requant` runs.
`--set key.path=value` overrides any line; an item of a list is named by its index, as in `quantize.0.bits`.
"""


PLAIN = {str: "text", int: "integer", float: "number", bool: "true or false"}


def reference() -> str:
    """The page, in Markdown: a table for each section of the recipe."""
    parts = [HEADING, *_section("top level", Recipe)]
    for target in (BitsAndBytesTarget, GPTQTarget, AWQTarget, CompressedTensorsTarget, GGUFTarget):
        parts += _section(f"quantize[]: {get_args(target.model_fields['format'].annotation)[0]}", target)
    return "\n".join(parts)


def _section(title: str, model: type[Section]) -> Iterator[str]:
    nested: list[tuple[str, type[Section]]] = []
    yield f"## {title}\n\n{(model.__doc__ or '').splitlines()[0]}\n"
    yield "| key | type | default | |\n|---|---|---|---|"
    for name, field in model.model_fields.items():
        key = field.alias or name
        inner = _inner(field.annotation)
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        yield f"| `{key}` | {_type(field.annotation)} | {default} | {' '.join((field.description or '').split())} |"
        if inner and not any(inner is known for _, known in nested) and key != "quantize":
            nested.append((key, inner))
    yield ""
    prefix = "" if model is Recipe else title + "."
    for key, inner in nested:
        yield from _section(f"{prefix}{key}", inner)


def _inner(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for argument in get_args(annotation) if (found := _inner(argument))), None)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(argument) for argument in arguments if argument is not type(None))
    if origin is tuple:
        return "list"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type):
        return "section" if issubclass(annotation, Section) else PLAIN[annotation]
    return _type(arguments[0]) if arguments else str(annotation)


def _default(value: Any) -> str:
    if value is None or value is PydanticUndefined or value in ((), {}):
        return "none"
    return "as below" if isinstance(value, Section) else f"`{value}`"
