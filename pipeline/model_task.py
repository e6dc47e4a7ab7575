"""What a model on disk answers, and so what rows it is judged on; from its JSON files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline import pairing
from pipeline.checkpoint import architecture_of, read_json
from pipeline.errors import DataError
from pipeline.sections import LABELLED, Data, Kind

Task = Literal["language", "classification", "regression", "tagging", "pairs"]

ROWS_OF: Mapping[Task, frozenset[Kind]] = {
    "language": frozenset({"text", "messages", "prompt_completion"}),
    "classification": frozenset({"classification"}),
    "regression": frozenset({"regression"}),
    "tagging": frozenset({"tagged"}),
    "pairs": frozenset({"pairs"}),
}
# What the rows of each task hold, for whoever has others.
_REMEDIES: Mapping[Task, str] = {
    "language": "text, messages, or prompt and completion",
    "classification": "a text and its label; data.field and data.label say how those are called",
    "regression": "a text and a number; data.field and data.label say how those are called",
    "tagging": "tokens and the tag of each",
    "pairs": "an anchor and its positive",
}


def task_of(folder: Path) -> Task:
    """What the model in a folder answers; raise DataError for one that answers what nothing here judges."""
    if pairing.is_projected(folder):
        return pairing.read_description(folder).task
    return task_of_config(read_json(folder / "config.json"), named=str(folder))


def task_of_config(config: Mapping[str, Any], *, named: str) -> Task:
    """What a model of such a config.json answers, by the class that comes first in `architectures`."""
    name = architecture_of(config)
    if name.endswith("ForTokenClassification"):
        return "tagging"
    if name.endswith("ForSequenceClassification"):
        problem = config.get("problem_type")
        if problem == "multi_label_classification":
            raise DataError(
                f"{named}: gives a row several labels (problem_type {problem}), which nothing here judges; "
                "leave out evaluate"
            )
        count = len(labels_of(config))
        if problem == "regression" and count > 1:
            raise DataError(
                f"{named}: gives {count} numbers for a row, and only one is judged here; leave out evaluate"
            )
        return "regression" if count == 1 else "classification"
    if name.endswith("ForMaskedLM"):
        raise DataError(
            f"{named}: {name} fills in masked tokens, which nothing here judges; leave out evaluate, or train a head "
            "or projector on it"
        )
    return "language"


def labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a classifier's labels, in the order of its logits; transformers' own where it names none."""
    named = config.get("id2label")
    if isinstance(named, dict) and named:
        return tuple(str(named[key]) for key in sorted(named, key=int))
    count = config.get("num_labels")
    return _placeholders(count if isinstance(count, int) else 2)


def unnamed(names: tuple[str, ...]) -> bool:
    """Whether labels have transformers' placeholders for names."""
    return names == _placeholders(len(names))


def _placeholders(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(count))


def own_labels(config: Mapping[str, Any], kind: Kind) -> tuple[str, ...] | None:
    """The labels of a head that a model already has for rows of `kind`, in order; None where its head is for others.

    Of a regression, and of a head that was never told its labels' names, None too.
    """
    name = architecture_of(config)
    suffix = {"classification": "ForSequenceClassification", "tagged": "ForTokenClassification"}.get(kind)
    names = labels_of(config)
    return names if suffix and name.endswith(suffix) and not unnamed(names) else None


def classes_of(folder: Path) -> tuple[str, ...] | None:
    """The names of the labels that the model in a folder chooses from, or None where it gives numbers or vectors."""
    if pairing.is_projected(folder):
        return pairing.read_description(folder).classes
    config = read_json(folder / "config.json")
    return None if task_of_config(config, named=str(folder)) in {"language", "regression"} else labels_of(config)


def kind_for(task: Task, kind: Kind, *, data: Data, named: str) -> Kind:
    """What rows that look like `kind` are read as for a model of that task.

    Whole numbers look like names of classes, and a regressor knows better. Raise DataError where rows of such a kind
    say nothing of the model.
    """
    if kind in ROWS_OF[task]:
        return kind
    if data.format == "auto" and (task, kind) == ("regression", "classification"):
        return "regression"
    text = ", or read them as text with data.format" if task == "language" and kind in LABELLED else ""
    raise DataError(
        f"{data.path}: holds {kind} rows, but {named} is a model for {task}; name rows of {_REMEDIES[task]}{text}"
    )
