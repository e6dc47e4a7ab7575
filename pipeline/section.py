"""What every part of a recipe shares: no key is taken that is not known, and what is wrong is one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


class Section(BaseModel):
    """A frozen part of the recipe that names the nearest valid key when it meets an unknown one."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        valid = {field.alias or name for name, field in cls.model_fields.items()}
        for key in value:
            if key not in valid and key not in cls.model_fields:
                raise ValueError(unknown_key(str(key), valid))
        return value


def unknown_key(key: str, valid: Collection[str]) -> str:
    """Say that `key` is unknown, with the nearest valid key where one is near."""
    near = difflib.get_close_matches(key, sorted(valid), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"valid keys are {', '.join(sorted(valid))}"
    return f"unknown key {key}; {hint}"


def first_sentence(error: ValidationError) -> str:
    """The first of pydantic's findings as `place: what was found`.

    Of a value that may be a word, rows or a list of them pydantic says first that it is not the word.
    """
    findings = error.errors(include_url=False)
    telling = [one for one in findings if one["type"] in {"value_error", "missing", "too_short"}]
    first = telling[0] if telling and findings[0]["type"] == "literal_error" else findings[0]
    tags = {"bitsandbytes", "gptq", "awq", "compressed-tensors", "gguf", "Data", "literal['train']"}
    place = ".".join(str(part) for part in first["loc"] if str(part) not in tags and "[" not in str(part))
    said = first["msg"].removeprefix("Value error, ")
    found = first.get("input")
    shown = f" (found {found!r})" if isinstance(found, (str, int, float, bool)) else ""
    return f"{place}: {said}{shown}" if place else f"{said}{shown}"
