"""Rows become token ids: for training, for calibration and for evaluation alike.

Documents are joined with the end-of-sequence token between them and cut into blocks; conversations go through the
tokenizer's chat template; prompts and completions are encoded apart, as they are when the model is used. A label is
the token itself where it counts for the loss and -100 where it does not (torch's `ignore_index`); the shift by one is
the model's.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.errors import CheckpointError, DataError
from pipeline.row_kinds import texts_of
from pipeline.rows import Completion, Conversation, Row, Text

IGNORED = -100
_BATCH = 256  # documents handed to the tokenizer at once; it encodes them in parallel
_POOL = 8  # blocks read for each calibration sample wanted: a choice, without encoding a large file whole
# The tag of transformers' chat templates that marks what the assistant says.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """Token ids, and for each the label it is judged by: the id itself, or -100 where it is not judged."""

    input_ids: list[int]
    labels: list[int]

    @property
    def judged(self) -> int:
        """Tokens that count for the loss; the first has nothing before it to be predicted from."""
        return sum(label != IGNORED for label in self.labels[1:])


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


def encode(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, *, sequence_length: int) -> list[Sequence]:
    """Sequences of at most `sequence_length` tokens.

    Documents are packed: every block but the last is full, and a last block of one token, which nothing can be
    predicted in, is dropped. Conversations and completions are one sequence each, in order; one that is longer than
    `sequence_length`, or in which nothing is judged, raises DataError: neither is ever cut.
    """
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise DataError("the data holds no rows; name a file with at least one")
    rows = itertools.chain([first], rows)
    if isinstance(first, Text):
        return _blocks(_document_tokens(_texts(rows), tokenizer), sequence_length)
    return [_within(row, encode_row(row, tokenizer), sequence_length) for row in rows]


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
            raise AssertionError(row)


def padded(batch: list[Sequence], *, pad_token: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each int64 [B, T], padded on the right to the longest sequence."""
    length = max(len(sequence.input_ids) for sequence in batch)

    def filled(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([[*row, *[filler] * (length - len(row))] for row in rows], dtype=torch.int64)

    return {
        "input_ids": filled([sequence.input_ids for sequence in batch], pad_token),
        "attention_mask": filled([[1] * len(sequence.input_ids) for sequence in batch], 0),
        "labels": filled([sequence.labels for sequence in batch], IGNORED),
    }


def calibration_samples(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int
) -> torch.Tensor:
    """At most `samples` blocks of `length` tokens without padding: int64 [samples, length].

    Rows are shuffled by `seed`, joined with the end-of-sequence token between them and cut into blocks, of which
    `samples` are drawn. The same rows, tokenizer and arguments give the same tensor. Fewer blocks come back where the
    rows have no more tokens; DataError where they do not fill one.
    """
    choice = random.Random(seed)  # noqa: S311 -- a reproducible choice, not a secret
    shuffled = list(rows)
    choice.shuffle(shuffled)
    wanted = samples * length * _POOL
    tokens = list(itertools.islice(_row_tokens(shuffled, tokenizer), wanted))
    count = len(tokens) // length
    if count == 0:
        raise DataError(
            f"calibration: the rows have {len(tokens)} tokens, fewer than one sample of {length}; "
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
    if any(isinstance(row, Conversation | Completion) for row in rows):
        for row in rows:  # a conversation and a completion bring their own end
            yield from encode_row(row, tokenizer).input_ids
        return
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
    messages = [{"role": message.role, "content": message.content} for message in row.messages]
    if tokenizer.chat_template is None:
        raise DataError(
            f"{row.place}: messages need a chat template, which the tokenizer lacks; add chat_template.jinja to the "
            "source, or write prompt and completion instead"
        )
    if _GENERATION.search(str(tokenizer.get_chat_template())):
        encoded = _template(
            row, tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    else:
        ids, mask = _masked_by_prefix(row, tokenizer, messages)
    return Sequence(
        input_ids=list(ids), labels=[token if said else IGNORED for token, said in zip(ids, mask, strict=True)]
    )


def _masked_by_prefix(
    row: Conversation, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> tuple[list[int], list[bool]]:
    """Ids, and which of them the assistant says: what the template adds to what came before each of its turns."""
    whole = _template(row, tokenizer, messages, tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _template(row, tokenizer, messages[:i], tokenize=False, add_generation_prompt=True)
            after = _template(row, tokenizer, messages[: i + 1], tokenize=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{row.place}: the chat template renders message {i + 1} differently once more messages follow, so "
                    "the assistant's tokens cannot be told apart; mark them in the template with "
                    "{% generation %}, or end the conversation at its first assistant turn"
                )
            spans.append((len(before), len(after)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # A token that straddles the border, such as a space and a word, is the assistant's: its word must be learned.
    said = [any(start < last and first < end for first, last in spans) for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], said


def _template(
    row: Conversation, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: bool
) -> Any:
    """What the chat template makes of `messages`; `options` are apply_chat_template's switches."""
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise DataError(
            f"{row.place}: the chat template refuses it ({error}); mind the order of roles that it expects"
        ) from error


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


def _within(row: Row, sequence: Sequence, limit: int) -> Sequence:
    if len(sequence.input_ids) > limit:
        raise DataError(
            f"{row.place}: has {len(sequence.input_ids)} tokens, the limit is {limit}; raise sequence_length "
            "or shorten the row"
        )
    if sequence.judged == 0:
        raise DataError(f"{row.place}: no token of it is learned from; give the assistant something to say")
    return sequence
