"""A head or a projector trained on features of its frozen backbone, which runs once over the rows, whatever the epochs.

What transformers' Trainer would check is checked here too: what trains is what the method says, the loss of a fixed
sample fell, every weight moved. The backbone takes no part in the loop, so nothing of it can change.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, TrainingArguments

from pipeline import progress
from pipeline.checkpoint import Checkpoint
from pipeline.digests import DigestCache
from pipeline.errors import CheckFailed
from pipeline.jobs import Job, fresh
from pipeline.model_class import class_of
from pipeline.training import head, processes, replay
from pipeline.training.checks import Record, check_loss, loss_of, sample_of
from pipeline.training.examples import Examples
from pipeline.training.feature_loop import Fitted, fit
from pipeline.training.feature_rows import LabelledRows, PairRows, Rows, pair_texts
from pipeline.training.features import Features, Kept, features, pooled
from pipeline.training.model import compute_dtype, load
from pipeline.training.projected import write_projector
from pipeline.training.projector import FeatureProjector, begin, width_of
from pipeline.training.task import Task
from pipeline.training.watching import STAGE, written_to

LIMIT = 50 * 10**9  # bytes of features that a store keeps; what was used longest ago makes room


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What features are of: a job on a base, computed on a device."""

    job: Job
    base: Checkpoint
    task: Task
    device: str

    @property
    def dtype(self) -> torch.dtype:
        """What the backbone computes in."""
        return compute_dtype(self.base, self.device)

    def placed(self, model: Any) -> Any:
        """The model where it computes; a quantized one is there since it was loaded."""
        return model.to(self.device) if self.base.quantization is None else model

    def features(self, model: Any, texts: Sequence[list[int]], kept: Kept, width: int) -> Features:
        """The features of `texts`, from the cache where they are there; `model` is called for the model otherwise."""
        cache = DigestCache()
        backbone = cache.files(self.base.folder, tuple(sorted(self.base.shards)))
        cache.save()
        return features(
            model, texts, folder=self.job.cache or self.job.workspace / "features", backbone=backbone,
            dtype=str(self.dtype), kept=kept, width=width, sequence_length=self.job.options["sequence_length"],
            pad_token=self.task.pad_token, limit_bytes=LIMIT,
        )  # fmt: skip


def train(
    ground: Ground, examples: Examples, validation: Examples | None, arguments: TrainingArguments, out: Path
) -> dict[str, float]:
    """Train the job's head or projector and write it to `out`; return the figures.

    Raise CheckFailed where the run did not do what its method says; its checkpoint stays.
    """
    _ = arguments.device  # has several processes meet, before they share the rows
    run = _head if ground.job.options["method"] == "head" else _projector
    with written_to(ground.job.logs or ground.job.workspace / "tensorboard"):
        return run(ground, examples, validation, arguments, out)


def _projector(
    ground: Ground, examples: Examples, validation: Examples | None, arguments: TrainingArguments, out: Path
) -> dict[str, float]:
    job, base, task = ground.job, ground.base, ground.task
    trust = job.trust_remote_code
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=trust, local_files_only=True)
    layer, description = begin(
        job.options["projector"], config, task=task.projected, classes=task.classes, seed=job.options["seed"]
    )

    @functools.cache
    def model() -> Any:
        loaded = load(
            base, Task(kind="text"), dtype=ground.dtype, seed=job.options["seed"], trust_remote_code=trust,
            model_class=class_of(base.config, trust_remote_code=trust),
        ).model  # fmt: skip
        return ground.placed(loaded)

    def rows(given: Examples) -> Rows:
        kept, width = pooled(description.pooling), description.in_features
        if task.kind == "pairs":
            parts = ([getattr(item, name) for item in given.items] for name in ("anchor", "positive", "negative"))
            texts, negative = pair_texts(*parts)
            return PairRows(features=ground.features(model, texts, kept, width), negative=negative)
        found = ground.features(model, [item.input_ids for item in given.items], kept, width)
        return LabelledRows(features=found, labels=_targets(given, task))

    trained, judged = rows(examples), rows(validation) if validation else None
    model.cache_clear()  # the loop has no use for the backbone
    figures = _fitted(FeatureProjector(layer, description.task), trained, judged, arguments)
    if processes.is_main():
        write_projector(fresh(out), layer, description)
    return figures


def _head(
    ground: Ground, examples: Examples, validation: Examples | None, arguments: TrainingArguments, out: Path
) -> dict[str, float]:
    job, task = ground.job, ground.task
    loaded = load(
        ground.base, task, dtype=ground.dtype, seed=job.options["seed"], trust_remote_code=job.trust_remote_code
    )
    head.prepare(loaded)
    model = ground.placed(loaded.model)
    texts = [item.input_ids for item in examples.items]
    kept = replay.kept_of(
        model, texts, sequence_length=job.options["sequence_length"], pad_token=task.pad_token
    )  # fmt: skip
    width = width_of(model.config) or 0

    def rows(given: Examples) -> Rows:
        found = ground.features(lambda: model, [item.input_ids for item in given.items], kept, width)
        labels = [item.labels if task.kind == "tagged" else item.target for item in given.items]
        regression = task.kind == "regression"
        return replay.head_rows(found, labels, kept, tagging=task.kind == "tagged", regression=regression)

    trained, judged = rows(examples), rows(validation) if validation else None
    module = replay.Replay(model).to("cpu")  # the head alone: its base is out of the way
    try:
        figures = _fitted(module, trained, judged, arguments)
    finally:
        module.undo()
    if processes.is_main():
        head.write_head(fresh(out), model, ground.base.path)
    return figures


def _targets(given: Examples, task: Task) -> torch.Tensor:
    dtype = torch.float32 if task.kind == "regression" else torch.int64
    return torch.tensor([item.target for item in given.items], dtype=dtype)


def _fitted(module: Any, rows: Rows, validation: Rows | None, arguments: TrainingArguments) -> dict[str, float]:
    """Run the loop and hold it against what every training must do."""
    names = [name for name, weight in module.named_parameters() if weight.requires_grad]
    size = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    progress.message(STAGE, f"trains {size:,} parameters, in {len(names):,} tensors, on features of {len(rows):,} rows")
    begun = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    sample = [rows.batch(torch.tensor(sample_of(range(len(rows)))))]
    record = Record(Path(str(arguments.output_dir)))
    before = record.get("loss_before")
    if before is None:
        before = loss_of(module, sample, device=torch.device("cpu"))
        check_loss(before)
        record.put(loss_before=before)
    fitted = fit(module, rows, arguments, validation=validation)
    after = loss_of(module.to("cpu"), sample, device=torch.device("cpu"))
    still = [name for name in names if torch.equal(begun[name], module.get_parameter(name).detach())]
    if still:
        raise CheckFailed(
            f"train: {still[0]} did not move in {fitted.steps} steps; leave out what the loss does not depend on, or "
            "raise train.arguments.learning_rate"
        )
    check_loss(before, after)
    return _figures(fitted, before, after)


def _figures(fitted: Fitted, before: float, after: float) -> dict[str, float]:
    found = {
        "train_loss": fitted.loss, "steps": fitted.steps, "rows": fitted.rows,
        "trainable_parameters": fitted.trainable_parameters, "sample_loss_before": before, "sample_loss_after": after,
    }  # fmt: skip
    more = {"validation_loss": fitted.validation_loss, "validation_accuracy": fitted.validation_accuracy}
    return {**found, **{name: value for name, value in more.items() if value is not None}}
