"""Labelled rows become token ids and targets: for training, for features and for evaluation alike.

A text is encoded as the tokenizer encodes one for any user of the model, with its special tokens. None is ever cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from pipeline.encoding import IGNORED, Encoded, Sequence, TooLong, fitting
from pipeline.errors import CheckpointError, DataError
from pipeline.row_kinds import Labelled, Pair, Row, Tagged, kind_of

_BATCH = 256  # texts handed to the tokenizer at once; it encodes them in parallel
_SHOWN = 20  # labels that an error lists
RowType = TypeVar("RowType", Labelled, Tagged, Pair)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A text's token ids, and its class by number or the figure that it was given."""

    input_ids: list[int]
    target: int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class PairExample:
    """The token ids of two texts that belong together, and of one that does not belong to the first."""

    anchor: list[int]
    positive: list[int]
    negative: list[int] | None


def classes_of(rows: Iterable[Row]) -> tuple[str, ...]:
    """The names of the labels or tags, sorted, whole numbers by value; raise DataError for fewer than two."""
    names: set[str] = set()
    for row in rows:
        match row:
            case Labelled() if not isinstance(row.label, float):
                names.add(str(row.label))
            case Tagged():
                names.update(row.tags)
            case _:
                raise DataError(f"{row.place}: is {kind_of(row)}, which has no classes; set data.format")
    if len(names) < 2:  # noqa: PLR2004 - with one class there is nothing to tell apart
        found = f"only the label {next(iter(names))}" if names else "no label"
        raise DataError(f"the training rows hold {found}; a classifier needs at least two")
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def encode_labelled(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    classes: tuple[str, ...] | None,
    sequence_length: int,
    too_long: TooLong = "refuse",
) -> Encoded[Example]:
    """Texts with the number of their class, or with `classes` None the figure that a regression is to give.

    Raise DataError for a label that is not among the classes, for a text without tokens, and for one that is too long.
    """
    numbers = None if classes is None else _numbered(classes)

    def examples() -> Iterator[tuple[str, int, Example]]:
        for batch in _batches(_only(rows, Labelled)):
            encoded = _texts_ids([(row.place, row.text) for row in batch], tokenizer)
            for row, ids in zip(batch, encoded, strict=True):
                yield row.place, len(ids), Example(input_ids=ids, target=_target(row, numbers))

    return fitting(examples(), sequence_length=sequence_length, too_long=too_long)


def encode_tagged(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    classes: tuple[str, ...],
    sequence_length: int,
    too_long: TooLong = "refuse",
) -> Encoded[Sequence]:
    """Words joined by spaces; the first subword of each carries the number of its tag, everything else -100.

    Words are joined, and not encoded one by one, since most language models have the space in the token that follows.
    Raise DataError for a tag that is not among the classes, for a word that becomes no token of its own, and for a row
    that is too long; CheckpointError for a tokenizer that does not say which letters a token stands for.
    """
    numbers = _numbered(classes)
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"{tokenizer.name_or_path}: its tokenizer does not say which letters a token stands for, which tags need; "
            "add tokenizer.json"
        )

    def sequences() -> Iterator[tuple[str, int, Sequence]]:
        for batch in _batches(_only(rows, Tagged)):
            encoded = tokenizer([" ".join(row.tokens) for row in batch], return_offsets_mapping=True, verbose=False)
            for row, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                yield row.place, len(ids), Sequence(input_ids=ids, labels=_tag_labels(row, offsets, numbers))

    return fitting(sequences(), sequence_length=sequence_length, too_long=too_long)


def encode_pairs(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, *, sequence_length: int, too_long: TooLong = "refuse"
) -> Encoded[PairExample]:
    """The texts of each pair, each by itself; a pair is as long as its longest text."""

    def examples() -> Iterator[tuple[str, int, PairExample]]:
        for batch in _batches(_only(rows, Pair)):
            anchors = _texts_ids([(row.place, row.anchor) for row in batch], tokenizer)
            positives = _texts_ids([(row.place, row.positive) for row in batch], tokenizer)
            given = [(row.place, row.negative) for row in batch if row.negative is not None]
            negatives = iter(_texts_ids(given, tokenizer))
            for row, anchor, positive in zip(batch, anchors, positives, strict=True):
                negative = None if row.negative is None else next(negatives)
                tokens = max(len(anchor), len(positive), len(negative or []))
                yield row.place, tokens, PairExample(anchor=anchor, positive=positive, negative=negative)

    return fitting(examples(), sequence_length=sequence_length, too_long=too_long)


def padded_examples(batch: list[Example], *, pad_token: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """`padded_ids` of the texts, and `labels`: int64 [B] of classes, float32 [B] of figures."""
    targets = [example.target for example in batch]
    dtype = torch.float32 if any(isinstance(target, float) for target in targets) else torch.int64
    ids = padded_ids([example.input_ids for example in batch], pad_token=pad_token, length=length)
    return {**ids, "labels": torch.tensor(targets, dtype=dtype)}


def padded_ids(rows: Items[Items[int]], *, pad_token: int, length: int | None = None) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, each int64 [B, length], padded on the right; None: to the longest row."""
    length = max(len(ids) for ids in rows) if length is None else length
    ids = torch.full((len(rows), length), pad_token, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for i, row in enumerate(rows):
        assert len(row) <= length, "encode refuses or drops what is too long"
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def padded_pairs(batch: list[PairExample], *, pad_token: int) -> dict[str, torch.Tensor]:
    """`padded_ids` of anchors, positives and, where a row has one, negatives, under such names; `labels` 0 to B - 1."""
    texts = {
        "anchor": [row.anchor for row in batch],
        "positive": [row.positive for row in batch],
        "negative": [row.negative for row in batch if row.negative is not None],
    }
    found = {
        f"{part}_{name}": tensor
        for part, rows in texts.items()
        if rows
        for name, tensor in padded_ids(rows, pad_token=pad_token).items()
    }
    return {**found, "labels": torch.arange(len(batch))}


def _only(rows: Iterable[Row], kind: type[RowType]) -> Iterator[RowType]:
    found = False
    for row in rows:
        if not isinstance(row, kind):
            raise DataError(f"{row.place}: is {kind_of(row)}, expected {kind.__name__.lower()} rows; set data.format")
        found = True
        yield row
    if not found:
        raise DataError("the data holds no rows; name a file with at least one")


def _batches(rows: Iterator[RowType]) -> Iterator[list[RowType]]:
    while batch := list(itertools.islice(rows, _BATCH)):
        yield batch


def _texts_ids(texts: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of each (place, text); raise DataError for one that has none but those that every text has."""
    if not texts:
        return []
    encoded = tokenizer([text for _, text in texts], return_special_tokens_mask=True, verbose=False)
    for (place, _), special in zip(texts, encoded["special_tokens_mask"], strict=True):
        if all(special):
            raise DataError(f"{place}: its text has no tokens; write something or remove the row")
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _numbered(classes: tuple[str, ...]) -> dict[str, int]:
    return {name: number for number, name in enumerate(classes)}


def _target(row: Labelled, numbers: dict[str, int] | None) -> int | float:
    if numbers is not None:
        return _number(row.place, str(row.label), numbers)
    if not isinstance(row.label, float):
        raise DataError(f"{row.place}: label is {row.label!r}, expected a number; set data.format to regression")
    return row.label


def _number(place: str, name: str, numbers: dict[str, int]) -> int:
    if name not in numbers:
        known = ", ".join(itertools.islice(numbers, _SHOWN)) + (", …" if len(numbers) > _SHOWN else "")
        raise DataError(f"{place}: label {name!r} is not among the known ones ({known}); correct it or train with it")
    return numbers[name]


def _tag_labels(row: Tagged, offsets: list[tuple[int, int]], numbers: dict[str, int]) -> list[int]:
    """For each token the number of its word's tag, if it is the first of the word, else -100."""
    labels = [IGNORED] * len(offsets)
    word = begin = 0
    for i, (start, end) in enumerate(offsets):
        if word == len(row.tokens) or start >= begin + len(row.tokens[word]):
            break
        if begin < end and start < end:  # special tokens stand for no letters
            labels[i] = _number(row.place, row.tags[word], numbers)
            begin += len(row.tokens[word]) + 1
            word += 1
    if word < len(row.tokens):
        raise DataError(
            f"{row.place}: token {word + 1}, {row.tokens[word]!r}, becomes no token of the model's; remove it"
        )
    return labels
