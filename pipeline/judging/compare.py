"""A model beside its reference, on the same rows, in a process of their own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

from pipeline.encoding import load_tokenizer
from pipeline.errors import DataError
from pipeline.evaluation.tasks import Comparison
from pipeline.gates import Scores
from pipeline.judging import heads, language
from pipeline.judging.question import Question
from pipeline.model_task import Task, kind_for, task_of
from pipeline.rows import Row, kind_of, read_rows

_JUDGES: Mapping[Task, Callable[[Question], Scores]] = {
    "language": language.judge,
    "classification": heads.classification,
    "regression": heads.regression,
    "tagging": heads.tagging,
    "pairs": heads.pairs,
}


def compare(comparison: Comparison) -> Scores:
    """Load both models from their folders and judge them by what they answer.

    Raise DataError where the rows or the reference are of another kind than the model, NonFinite where the reference
    is broken.
    """
    task = task_of(comparison.path)
    if comparison.reference_path is not None and (other := task_of(comparison.reference_path)) != task:
        raise DataError(
            f"{comparison.variant}: is a model for {task}, but {comparison.reference} is one for {other}; compare it "
            f"with a model for {task}, or with none"
        )
    tokenizer = load_tokenizer(comparison.path, trust_remote_code=comparison.trust_remote_code)
    return _JUDGES[task](Question(task=comparison, rows=_rows(comparison, task), tokenizer=tokenizer))


def _rows(comparison: Comparison, task: Task) -> list[Row]:
    """The rows, all of the kind that the model answers."""
    data = comparison.data
    rows = read_rows(data)
    first = next(rows)
    kind = kind_of(first)
    if (wanted := kind_for(task, kind, data=data, named=comparison.variant)) != kind:
        return list(read_rows(data.model_copy(update={"format": wanted})))
    return list(itertools.chain([first], rows))
