"""Classifiers, taggers, regressors and projectors: do they say what the rows say."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.encoding import IGNORED
from pipeline.errors import DataError
from pipeline.evaluation import labels
from pipeline.gates import Scores
from pipeline.judging.answers import answers
from pipeline.judging.question import Question
from pipeline.labelled import encode_labelled, encode_pairs, encode_tagged
from pipeline.model_task import classes_of, unnamed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Both:
    """What the model said, and its reference, where it has one."""

    model: Tensor
    reference: Tensor | None


def classification(question: Question) -> Scores:
    """Accuracy and F1 of labels, one for each row."""
    names = _classes(question, (str(row.label) for row in question.rows))
    length = question.task.sequence_length
    found = encode_labelled(question.rows, question.tokenizer, classes=names, sequence_length=length).items
    both = _asked(question, [example.input_ids for example in found])
    wanted = torch.tensor([example.target for example in found], dtype=torch.int64)
    return question.scores(rows=len(found), **_of_labels(question, both, wanted))


def tagging(question: Question) -> Scores:
    """Accuracy and F1 of tags, one for each word, where its first token is."""
    names = _classes(question, (tag for row in question.rows for tag in row.tags))
    length = question.task.sequence_length
    found = encode_tagged(question.rows, question.tokenizer, classes=names, sequence_length=length).items
    tags = [torch.tensor(sequence.labels, dtype=torch.int64) for sequence in found]
    both = _asked(question, [sequence.input_ids for sequence in found], where=[row != IGNORED for row in tags])
    wanted = torch.cat([row[row != IGNORED] for row in tags])
    return question.scores(rows=len(found), tokens=len(wanted), **_of_labels(question, both, wanted))


def regression(question: Question) -> Scores:
    """The root mean squared error of numbers, one for each row."""
    length = question.task.sequence_length
    found = encode_labelled(question.rows, question.tokenizer, classes=None, sequence_length=length).items
    both = _asked(question, [example.input_ids for example in found])
    wanted = torch.tensor([example.target for example in found], dtype=torch.float64)
    reference = None if both.reference is None else labels.root_mean_squared_error(both.reference[:, 0], wanted)
    question.check_reference(0.0 if reference is None else reference)
    return question.scores(
        rows=len(found),
        root_mean_squared_error=labels.root_mean_squared_error(both.model[:, 0], wanted),
        reference_error=reference,
    )


def pairs(question: Question) -> Scores:
    """Accuracy: the share of anchors whose own positive is the nearest by cosine of all positives of the rows.

    Positives of the same tokens are one.
    """
    found = encode_pairs(question.rows, question.tokenizer, sequence_length=question.task.sequence_length).items
    places: dict[tuple[int, ...], int] = {}
    own = torch.tensor([places.setdefault(tuple(pair.positive), len(places)) for pair in found])
    both = _asked(question, [*(pair.anchor for pair in found), *map(list, places)])
    nearest, right = _nearest(both.model, own)
    figures: dict[str, float | None] = {"accuracy": float(right.mean())}
    if both.reference is not None:
        others, right_others = _nearest(both.reference, own)
        figures["reference_accuracy"] = float(right_others.mean())
        question.check_reference(float(right_others.mean()))
        agreeing = float((nearest == others).double().mean())
        figures["top1_agreement"] = agreeing if math.isfinite(float(right.mean())) else math.nan
    return question.scores(rows=len(found), **figures)


def _nearest(vectors: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    return labels.nearest(vectors[: len(own)], vectors[len(own) :], own)


def _asked(question: Question, rows: list[list[int]], *, where: list[Tensor] | None = None) -> _Both:
    """What the model and its reference say of the rows, one after the other; of tokens only those `where` says."""

    def ask(path: Path, named: str) -> Tensor:
        pad = question.tokenizer.pad_token_id
        found = answers(question.load(path), rows, pad_token=pad, stage=f"evaluate {named}")
        return torch.stack(found) if where is None else torch.cat([a[w] for a, w in zip(found, where, strict=True)])

    task = question.task
    reference = ask(task.reference_path, f"{task.variant}'s reference") if task.reference_path else None
    return _Both(model=ask(task.path, task.variant), reference=reference)


def _of_labels(question: Question, both: _Both, wanted: Tensor) -> dict[str, float]:
    figures = {"accuracy": labels.accuracy(both.model, wanted), "f1": labels.macro_f1(both.model, wanted)}
    if both.reference is not None:
        figures["reference_accuracy"] = labels.accuracy(both.reference, wanted)
        figures["reference_f1"] = labels.macro_f1(both.reference, wanted)
        question.check_reference(figures["reference_accuracy"])
        figures["kl_divergence"] = labels.kl_divergence(both.model, both.reference)
        figures["top1_agreement"] = labels.agreement(both.model, both.reference)
    return figures


def _classes(question: Question, found: Iterable[str]) -> tuple[str, ...]:
    """The names of the model's labels, as the rows have them.

    A model that was never told any has transformers' own, LABEL_0 and so on; rows may then have the numbers alone.
    """
    task = question.task
    names = classes_of(task.path)
    if names is None:
        raise DataError(f"{task.path}: its projector.json names no classes; train the projector again")
    if task.reference_path is not None and (other := classes_of(task.reference_path)) != names:
        raise DataError(
            f"{task.variant}: chooses from {', '.join(names)}, but {task.reference} from {', '.join(other or ())}; "
            "compare models of the same labels"
        )
    numbers = tuple(str(i) for i in range(len(names)))
    return numbers if unnamed(names) and set(found) <= set(numbers) else names
