# ruff: noqa: ARG001 - a stand-in takes what it need not use
"""Rows with labels, as examples of token ids. A stand-in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from pipeline.encoding import IGNORED, Sequence
from pipeline.errors import DataError
from pipeline.rows import Labelled, Pair, Tagged


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """Token ids and what should be said of them."""

    input_ids: list[int]
    target: int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairExample:
    """Token ids of texts that belong together, and of one that does not."""

    anchor: list[int]
    positive: list[int]
    negative: list[int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Examples, how many rows were too long, and the longest."""

    items: list[Any]
    dropped: int
    longest: int


def encode_labelled(
    rows: Iterable[Labelled],
    tokenizer: PreTrainedTokenizerBase,
    *,
    classes: tuple[str, ...] | None,
    sequence_length: int,
    too_long: Literal["refuse", "drop"] = "refuse",
) -> Encoded:
    """An example for each row."""
    items = []
    for row in rows:
        target = float(row.label) if classes is None else _known(row.place, str(row.label), classes)
        items.append(Example(input_ids=_ids(row.place, row.text, tokenizer, sequence_length), target=target))
    return Encoded(items=items, dropped=0, longest=max(len(item.input_ids) for item in items))


def encode_tagged(
    rows: Iterable[Tagged],
    tokenizer: PreTrainedTokenizerBase,
    *,
    classes: tuple[str, ...],
    sequence_length: int,
    too_long: Literal["refuse", "drop"] = "refuse",
) -> Encoded:
    """A sequence for each row; a word's first token has its tag."""
    items = []
    for row in rows:
        ids: list[int] = []
        labels: list[int] = []
        for word, tag in zip(row.tokens, row.tags, strict=True):
            pieces = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
            ids += pieces
            labels += [_known(row.place, tag, classes)] + [IGNORED] * (len(pieces) - 1)
        items.append(Sequence(input_ids=ids, labels=labels))
    return Encoded(items=items, dropped=0, longest=max(len(item.input_ids) for item in items))


def encode_pairs(
    rows: Iterable[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    too_long: Literal["refuse", "drop"] = "refuse",
) -> Encoded:
    """A pair of examples for each row."""
    items = [
        PairExample(
            anchor=_ids(row.place, row.anchor, tokenizer, sequence_length),
            positive=_ids(row.place, row.positive, tokenizer, sequence_length),
            negative=None,
        )
        for row in rows
    ]
    return Encoded(items=items, dropped=0, longest=0)


def _ids(place: str, text: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    if len(ids) > limit:
        raise DataError(f"{place}: has {len(ids)} tokens, the limit is {limit}; raise sequence_length")
    return ids


def _known(place: str, label: str, classes: tuple[str, ...]) -> int:
    if label not in classes:
        raise DataError(f"{place}: its label {label} is not among {', '.join(classes)}; correct it")
    return classes.index(label)
