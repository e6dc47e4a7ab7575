"""Train: a checkpoint and rows become an adapter, a head, a projector, or a tuned checkpoint.

Where only a head or projector trains, the frozen backbone runs once over the rows and the loop is on its features
(`engine: features`); everything else goes through transformers' Trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from pipeline.checkpoint import Checkpoint
from pipeline.encoding import load_tokenizer
from pipeline.jobs import Job, Output, fresh
from pipeline.stages.launched import is_launched, run_launched
from pipeline.training import attached, processes
from pipeline.training.arguments import training_arguments
from pipeline.training.checks import Expectation
from pipeline.training.examples import Examples, read_examples, task_of
from pipeline.training.methods import METHODS, Method, Ready
from pipeline.training.task import Task
from pipeline.training.trainer import Course, Trained, train


def run(job: Job) -> Iterator[Output]:
    """Train on `job.inputs["base"]` with `job.data["train"]`: one output, called adapter, head, projector or tuned.

    `job.data["validation"]`, if any, is what training is watched on. `job.options`: method, engine, sequence_length,
    too_long, packing, trainable, lora, projector, grid (qat), arguments, launcher, seed. What a kill leaves in
    `job.workspace/checkpoints` is resumed from. Raise DataError, RecipeError or CheckpointError before the first step,
    NonFinite or CheckFailed where training fails.
    """
    yield from run_launched(f"{__name__}:run_here", job) if is_launched(job) else run_here(job)


def run_here(job: Job) -> Iterator[Output]:
    """The same in this process; in one of several, only the main one yields."""
    method = METHODS[job.options["method"]]
    base = Checkpoint.open(job.inputs["base"])
    tokenizer = load_tokenizer(base.path, trust_remote_code=job.trust_remote_code)
    task = task_of(job, base, tokenizer)
    examples = read_examples(job, "train", task, tokenizer)
    validation = read_examples(job, "validation", task, tokenizer) if "validation" in job.data else None
    device = "cuda" if torch.cuda.is_available() and not job.options["arguments"].get("use_cpu") else "cpu"
    arguments = training_arguments(
        job.options["arguments"],
        folder=job.workspace / "checkpoints",
        seed=job.options["seed"],
        mixed=method.masters and device == "cuda" and torch.cuda.is_bf16_supported(),
    )
    out = job.workspace / "out"
    if job.options.get("engine") == "features":
        ground = attached.Ground(job=job, base=base, task=task, device=device)
        trained = attached.train(ground, examples, validation, arguments, out)
    else:
        trained = _through_trainer(job, base, method, task, examples, validation, arguments, device=device, out=out)
    if processes.is_main():
        metrics = {**trained, "rows_dropped": examples.dropped}
        yield Output(variant=method.variant, folder=out, metrics=metrics)


def _through_trainer(
    job: Job, base: Checkpoint, method: Method, task: Task, examples: Examples, validation: Examples | None,
    arguments: TrainingArguments, *, device: str, out: Path,
) -> dict[str, float]:  # fmt: skip
    """Train with Trainer and write what came of it to `out`; return the figures."""

    def ready() -> Ready:
        return method.ready(base, task, job.options, device=device, trust_remote_code=job.trust_remote_code)

    first = ready()
    held = [first.model]
    # Where memory runs out, the model is made anew: nothing but `held` may keep the first one.
    first = replace(first, model=None, loaded=replace(first.loaded, model=None))
    course = Course(
        examples=examples.items,
        collate=examples.collate,
        expected=Expectation(method=job.options["method"], trainable=first.trainable),
        validation=validation.items if validation else (),
        divisible=task.kind != "pairs",
        logs=job.logs or job.workspace / "tensorboard",
    )

    def build() -> Any:
        return held.pop() if held else ready().model

    trained = train(build, course, arguments)
    if processes.is_main():
        method.write(trained.model, first, base, fresh(out))
    return _metrics(trained)


def _metrics(trained: Trained) -> dict[str, float]:
    found = {
        "train_loss": trained.loss, "steps": trained.steps, "tokens": trained.tokens,
        "trainable_parameters": trained.trainable_parameters, "sample_loss_before": trained.loss_before,
        "sample_loss_after": trained.loss_after,
    }  # fmt: skip
    return found if trained.validation_loss is None else {**found, "validation_loss": trained.validation_loss}
