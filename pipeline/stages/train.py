"""Train: a dense checkpoint and rows become an adapter (lora) or a tuned checkpoint (full)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import Checkpoint, copy_companions
from pipeline.encoding import encode, load_tokenizer, padded
from pipeline.rows import read_rows
from pipeline.stages import Job, Output
from pipeline.stages.launched import is_launched, run_launched
from pipeline.training import full, lora, processes
from pipeline.training.arguments import training_arguments
from pipeline.training.checks import Expectation
from pipeline.training.model import load_base, open_dense
from pipeline.training.trainer import Course, Trained, train


@dataclass(frozen=True, slots=True, kw_only=True)
class _Method:
    """How a method names its output, computes, readies the loaded model, and writes what came of it.

    `mixed` says whether a GPU computes in bf16 beside float32 weights.
    """

    variant: str
    mixed: bool
    dtype: Callable[[Checkpoint, str], torch.dtype]
    prepare: Callable[[Any, Checkpoint, Mapping[str, Any]], Any]
    write: Callable[[Any, Checkpoint, Path], None]
    trains: Callable[[str], bool]


def _prepare_lora(model: Any, base: Checkpoint, options: Mapping[str, Any]) -> Any:
    return lora.attach(model, options["lora"], base, seed=options["seed"])


def _prepare_full(model: Any, base: Checkpoint, _: Mapping[str, Any]) -> Any:
    full.check_names(model, base)
    return model


def _write_lora(model: Any, _: Checkpoint, folder: Path) -> None:
    lora.write_adapter(model, folder)


def _write_full(model: Any, base: Checkpoint, folder: Path) -> None:
    full.write_tuned(model, base, folder)
    copy_beside_weights(base, folder)


METHODS: Mapping[str, _Method] = {
    "lora": _Method(
        variant="adapter",
        mixed=False,
        dtype=lora.base_dtype,
        prepare=_prepare_lora,
        write=_write_lora,
        trains=lora.is_adapter,
    ),
    "full": _Method(
        variant="tuned",
        mixed=True,
        dtype=full.master_dtype,
        prepare=_prepare_full,
        write=_write_full,
        trains=lambda _: True,
    ),
}


def run(job: Job) -> Iterator[Output]:
    """Train, in this process or in as many as the recipe's launcher says."""
    if is_launched(job):
        yield from run_launched("pipeline.stages.train:run_here", job)
    else:
        yield from run_here(job)


def run_here(job: Job) -> Iterator[Output]:
    """Train `job.inputs["base"]`, dense, on `job.data["train"]`: one output, called adapter (lora) or tuned (full).

    `job.options`: method, sequence_length, lora, arguments, seed. What a kill leaves in `job.workspace/checkpoints` is
    resumed from. Raise DataError, RecipeError or CheckpointError before the first step, NonFinite where training fails.
    """
    method = METHODS[job.options["method"]]
    base = open_dense(Checkpoint.open(job.inputs["base"]))
    device = "cuda" if torch.cuda.is_available() and not job.options["arguments"].get("use_cpu") else "cpu"
    arguments = training_arguments(
        job.options["arguments"],
        folder=job.workspace / "checkpoints",
        seed=job.options["seed"],
        mixed=method.mixed and device == "cuda" and torch.cuda.is_bf16_supported(),
    )
    tokenizer = load_tokenizer(base.path, trust_remote_code=job.trust_remote_code)
    sequences = encode(read_rows(job.data["train"]), tokenizer, sequence_length=job.options["sequence_length"])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # masked, so any id will do

    def build() -> Any:
        model = load_base(base, dtype=method.dtype(base, device), trust_remote_code=job.trust_remote_code)
        return method.prepare(model, base, job.options)

    course = Course(
        examples=sequences,
        collate=partial(padded, pad_token=pad),
        expected=Expectation(method=job.options["method"], trainable=method.trains),
        logs=job.workspace / "tensorboard",
    )
    trained = train(build, course, arguments)
    if not processes.is_main():
        return
    folder = fresh(job.workspace / "out")
    method.write(trained.model, base, folder)
    yield Output(variant=method.variant, folder=folder, metrics=_metrics(trained))


def fresh(folder: Path) -> Path:
    """The folder, empty: what a kill left half written is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def copy_beside_weights(base: Checkpoint, folder: Path) -> None:
    """Copy config.json, tokenizer and whatever else goes with the weights, unchanged."""
    shutil.copyfile(base.path / "config.json", folder / "config.json")
    copy_companions(base.path, folder)


def _metrics(trained: Trained) -> dict[str, float]:
    return {
        "train_loss": trained.loss,
        "sample_loss_before": trained.loss_before,
        "sample_loss_after": trained.loss_after,
        "steps": trained.steps,
        "tokens": trained.tokens,
        "trainable_parameters": trained.trainable_parameters,
    }
