"""Rows become token ids: for training, for calibration and for evaluation alike.

Documents are joined with the end-of-sequence token between them and cut into blocks; conversations go through the
tokenizer's chat template; prompts and completions are encoded apart, as they are when the model is used. A label is
the token itself where it counts for the loss and -100 where it does not (torch's `ignore_index`); the shift by one is
the model's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline import progress
from pipeline.chat import chat_tokens
from pipeline.errors import CheckpointError, DataError
from pipeline.packing import best_fit
from pipeline.row_kinds import Completion, Conversation, Row, Text, kind_of, texts_of

TooLong = Literal["refuse", "drop"]
Item = TypeVar("Item")

IGNORED = -100
_BATCH = 256  # documents handed to the tokenizer at once; it encodes them in parallel
_POOL = 8  # blocks read for each calibration sample wanted: a choice, without encoding a large file whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """Token ids, and for each the label it is judged by: the id itself, or -100 where it is not judged.

    `position_ids` are those of rows that share a sequence: they begin at 0 in each, by which transformers' attention
    masks tell them apart.
    """

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int] | None = None

    @property
    def judged(self) -> int:
        """Tokens that count for the loss; the first has nothing before it to be predicted from."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded(Generic[Item]):
    """What rows became; how many were dropped as too long, and the tokens of the longest, dropped ones included."""

    items: list[Item]
    dropped: int
    longest: int


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder; raise CheckpointError where there is none that loads."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder}: its tokenizer does not load ({said}); add the tokenizer files, or trust_remote_code: true "
            "where it brings its own code"
        ) from error


def encode(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    too_long: TooLong = "refuse",
    packing: bool = False,
) -> Encoded[Sequence]:
    """Sequences of at most `sequence_length` tokens, for a language model.

    Documents are joined and cut into blocks: every block but the last is full, and a last block of one token, which
    nothing can be predicted in, is dropped. Conversations and completions are one sequence each, in order, or with
    `packing` share sequences, each blind to the others. None is ever cut: one that is too long is dropped or raises
    DataError, as does one in which nothing is judged.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise DataError("the data holds no rows; name a file with at least one")
    rows = itertools.chain([first], rows)
    if isinstance(first, Text):
        blocks = _blocks(_document_tokens(_texts(rows), tokenizer), sequence_length)
        return Encoded(items=blocks, dropped=0, longest=len(blocks[0].input_ids))
    encoded = fitting(_learned(rows, tokenizer, sequence_length), sequence_length=sequence_length, too_long=too_long)
    return replace(encoded, items=_packed(encoded.items, sequence_length)) if packing else encoded


def fitting(encoded: Iterable[tuple[str, int, Item]], *, sequence_length: int, too_long: TooLong) -> Encoded[Item]:
    """The items (place, tokens, item) that fit; the others are counted, then dropped, or refused by a DataError."""
    items: list[Item] = []
    dropped = longest = 0
    where = ""
    for place, tokens, item in encoded:
        if tokens > longest:
            longest, where = tokens, place
        if tokens <= sequence_length:
            items.append(item)
        else:
            dropped += 1
    rows = f"{dropped} of {len(items) + dropped} rows are longer"
    if dropped and (too_long == "refuse" or not items):
        remedy = "raise sequence_length, shorten them" + (", or set too_long to drop" if items else "")
        raise DataError(f"{where}: has {longest} tokens, the limit is {sequence_length}; {rows}; {remedy}")
    if dropped:
        progress.message(
            "data", f"drops rows: {rows} than {sequence_length} tokens; the longest, {where}, has {longest}"
        )
    return Encoded(items=items, dropped=dropped, longest=longest)


def encode_row(row: Row, tokenizer: PreTrainedTokenizerBase) -> Sequence:
    """One row by itself, however long it is."""
    match row:
        case Text():
            ids = list(itertools.chain.from_iterable(_encode_texts([row.text], tokenizer)))
            return Sequence(input_ids=ids, labels=list(ids))
        case Conversation():
            return _conversation(row, tokenizer)
        case Completion():
            return _completion(row, tokenizer)
        case _:
            raise DataError(
                f"{row.place}: is {kind_of(row)}, which a language model does not learn from; set data.format to text, "
                "or train a head or a projector"
            )


def padded(batch: list[Sequence], *, pad_token: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels`, each int64 [B, T], padded on the right to the longest sequence, and `attention_mask`.

    Where rows share sequences there are `position_ids` instead of the mask: transformers tells rows apart only without
    a mask and with use_cache=False, which Trainer sets. The padding is then a row of its own, which no other sees.
    """
    length = max(len(sequence.input_ids) for sequence in batch)

    def filled(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows], dtype=torch.int64)

    ids = filled([sequence.input_ids for sequence in batch], pad_token)
    labels = filled([sequence.labels for sequence in batch], IGNORED)
    if all(sequence.position_ids is None for sequence in batch):
        mask = filled([[1] * len(sequence.input_ids) for sequence in batch], 0)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    positions = [sequence.position_ids or list(range(len(sequence.input_ids))) for sequence in batch]
    restarted = [[*row, *range(length - len(row))] for row in positions]
    return {"input_ids": ids, "position_ids": torch.tensor(restarted, dtype=torch.int64), "labels": labels}


def calibration_samples(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
    named: str = "calibration",
) -> torch.Tensor:
    """At most `samples` blocks of `length` tokens without padding: int64 [samples, length].

    Rows are shuffled by `seed`, joined with the end-of-sequence token between them and cut into blocks, of which
    `samples` are drawn. The same rows, tokenizer and arguments give the same tensor. Fewer blocks come back where the
    rows have no more tokens; DataError, in which they are `named`, where they do not fill one.
    """
    choice = random.Random(seed)  # noqa: S311 -- a reproducible choice, not a secret
    shuffled = list(rows)
    choice.shuffle(shuffled)
    wanted = samples * length * _POOL
    tokens = list(itertools.islice(_row_tokens(shuffled, tokenizer), wanted))
    count = len(tokens) // length
    if count == 0:
        raise DataError(
            f"{named}: the rows have {len(tokens)} tokens, fewer than one sample of {length}; "
            "give more text or lower calibration.sequence_length"
        )
    drawn = choice.sample(range(count), min(samples, count))
    return torch.tensor([tokens[i * length : (i + 1) * length] for i in drawn], dtype=torch.int64)


def _texts(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        assert isinstance(row, Text), "a file holds rows of one kind"
        yield row.text


def _row_tokens(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """The tokens of every row, joined; of a labelled row, a tagged one and a pair, those of its texts."""
    rows = list(rows)
    if rows and isinstance(rows[0], (Conversation, Completion)):
        for row in rows:  # a conversation and a completion bring their own end
            yield from encode_row(row, tokenizer).input_ids
    else:
        yield from _document_tokens((text for row in rows for text in texts_of(row)), tokenizer)


def _document_tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """The tokens of every document, with the end-of-sequence token between two; an empty document adds nothing."""
    begun = False
    for ids in _encode_texts(texts, tokenizer):
        if begun:
            yield _end_token(tokenizer)
        yield from ids
        begun = True


def _encode_texts(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Each text's ids, as the tokenizer begins a text (with its own first token, if it has one) but never ended."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _BATCH)):
        # Documents are longer than any model's window by nature; `verbose` is the warning that says so.
        for text, ids in zip(batch, tokenizer(batch, verbose=False)["input_ids"], strict=True):
            if text:  # of nothing, a tokenizer with a beginning token of its own would make a document
                yield ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _blocks(tokens: Iterator[int], length: int) -> list[Sequence]:
    blocks = []
    while block := list(itertools.islice(tokens, length)):
        if len(block) > 1:
            blocks.append(Sequence(input_ids=block, labels=list(block)))
    if not blocks:
        raise DataError(
            "the documents have fewer than two tokens together, so nothing can be predicted; give more text"
        )
    return blocks


def _conversation(row: Conversation, tokenizer: PreTrainedTokenizerBase) -> Sequence:
    ids, said = chat_tokens(row, tokenizer)
    return Sequence(input_ids=ids, labels=[token if each else IGNORED for token, each in zip(ids, said, strict=True)])


def _completion(row: Completion, tokenizer: PreTrainedTokenizerBase) -> Sequence:
    prompt = next(_encode_texts([row.prompt], tokenizer), [])
    completion = tokenizer(row.completion, add_special_tokens=False, verbose=False)["input_ids"]
    answer = [*completion, _end_token(tokenizer)]
    return Sequence(input_ids=[*prompt, *answer], labels=[IGNORED] * len(prompt) + answer)


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"{tokenizer.name_or_path}: the tokenizer names no eos_token; add it to tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def _learned(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, limit: int
) -> Iterator[tuple[str, int, Sequence]]:
    for row in rows:
        sequence = encode_row(row, tokenizer)
        tokens = len(sequence.input_ids)
        if tokens <= limit and sequence.judged == 0:
            raise DataError(f"{row.place}: no token of it is learned from; give the assistant something to say")
        yield row.place, tokens, sequence


def _packed(sequences: list[Sequence], capacity: int) -> list[Sequence]:
    lengths = [len(sequence.input_ids) for sequence in sequences]
    return [_joined([sequences[i] for i in together]) for together in best_fit(lengths, capacity)]


def _joined(rows: list[Sequence]) -> Sequence:
    """Rows in one sequence. The first label of each is not judged: what stands before it is another row's end."""
    return Sequence(
        input_ids=[token for row in rows for token in row.input_ids],
        labels=[label for row in rows for label in (IGNORED, *row.labels[1:])],
        position_ids=[position for row in rows for position in range(len(row.input_ids))],
    )
