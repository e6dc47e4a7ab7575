"""A file's rows as what a model trains on: encoded for its task, counted, and put together into batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline import progress
from pipeline.checkpoint import Checkpoint
from pipeline.encoding import IGNORED, encode, padded
from pipeline.labelled import classes_of, encode_labelled, encode_pairs, encode_tagged, padded_examples
from pipeline.rows import check_rows, read_rows
from pipeline.stages import Job
from pipeline.training.projector import padded_pairs
from pipeline.training.task import Task, known_classes

Batch = Mapping[str, torch.Tensor]
BATCH = 8  # examples in a batch where only a loss is wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Encoded rows; `collate` makes a padded batch of some, `dropped` counts the rows that were too long."""

    items: Sequence[Any]
    collate: Callable[[list[Any]], Batch]
    dropped: int

    @property
    def tokens(self) -> int:
        """Tokens of all items, padding left out."""
        return sum(_length(item) for item in self.items)


def task_of(job: Job, base: Checkpoint) -> Task:
    """What the training rows ask for; labels in the order of the base's own head, where it has one for them."""
    data = job.data["train"]
    kind = check_rows(data, limit=None)
    if kind not in {"classification", "tagged"}:
        return Task(kind=kind)
    # Of every part: a label that only held-out rows have is one of the model's too.
    everything = data.model_copy(update={"held_out": 0.0, "validation": 0.0, "part": "train"})
    return Task(kind=kind, classes=known_classes(base, classes_of(read_rows(everything))))


def read_examples(job: Job, role: str, task: Task, tokenizer: Any) -> Examples:
    """The rows of `job.data[role]`; raise DataError for the first that is wrong, or too long where that is refused."""
    rows, options = read_rows(job.data[role]), job.options
    common = {"sequence_length": options["sequence_length"], "too_long": options.get("too_long", "refuse")}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked, so any id will do
    if task.kind in {"classification", "regression"}:
        encoded = encode_labelled(rows, tokenizer, classes=task.classes, **common)
    elif task.kind == "tagged":
        encoded = encode_tagged(rows, tokenizer, classes=task.classes, **common)
    elif task.kind == "pairs":
        encoded = encode_pairs(rows, tokenizer, **common)
    else:
        encoded = encode(rows, tokenizer, packing=options.get("packing", False), **common)
    return Examples(items=encoded.items, collate=_Collate(kind=task.kind, pad_token=pad), dropped=encoded.dropped)


@torch.inference_mode()
def mean_loss(model: Any, examples: Examples) -> float:
    """The mean loss over `examples`: for each judged token, or for each row of a classifier."""
    model.eval()
    total, count = 0.0, 0
    batches = [examples.items[i : i + BATCH] for i in range(0, len(examples.items), BATCH)]
    for done, items in enumerate(batches, start=1):
        batch = {name: tensor.to(model.device) for name, tensor in examples.collate(list(items)).items()}
        labels = batch["labels"]
        judged = int((labels[:, 1:] != IGNORED).sum()) if labels.ndim > 1 else len(labels)
        total, count = total + judged * float(model(**batch).loss), count + judged
        progress.step("validation", done=done, total=len(batches), unit="batches")
    return total / max(1, count)
