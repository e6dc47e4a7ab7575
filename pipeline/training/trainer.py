"""The training loop: transformers' Trainer, checked, resumed after a kill, smaller when memory runs out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import IntervalStrategy

from pipeline import progress
from pipeline.errors import OutOfMemory, RecipeError
from pipeline.training import processes
from pipeline.training.checks import (
    Batch,
    Counts,
    Expectation,
    Reached,
    Record,
    check_labels,
    check_loss,
    check_trainable,
    loss_of,
    sample_of,
    trainable_names,
)
from pipeline.training.frozen import check_frozen, frozen_digests
from pipeline.training.loop import SampleLoss, WatchedTrainer
from pipeline.training.memory import MicroBatch, is_out_of_memory, known_micro_batch, release, shrink
from pipeline.training.model import check_finite
from pipeline.training.resume import Resumable, resume_point
from pipeline.training.watching import LAST_LOSSES, STAGE, Events, Meter, say_where, tensorboard_in

Build = Callable[[], Any]
Collate = Callable[[list[Any]], Batch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training came to.

    `model` holds the trained weights, whole, in the main process; under FSDP it is None in the others. `tokens` are
    those seen, padding left out; `loss` is the mean of the last logged ones; `loss_before` and `loss_after` are those
    of the fixed sample.
    """

    model: Any
    steps: int
    tokens: int
    loss: float
    trainable_parameters: int
    loss_before: float
    loss_after: float
    validation_loss: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What a model is trained on, and what is expected of it.

    `collate` makes a batch of examples; it and the model agree on its names. `expected` is what the method says. Each
    epoch ends with the loss of `validation`, if there is any. `divisible` is false where the loss compares the rows of
    a batch, so that halves of it are not the same. TensorBoard's files go to `logs`.
    """

    examples: Items[Any]
    collate: Collate
    expected: Expectation
    validation: Items[Any] = ()
    divisible: bool = True
    logs: Path | None = None
    callbacks: Items[TrainerCallback] = ()


def train(build: Build, course: Course, arguments: TrainingArguments) -> Trained:
    """Train the parameters that require gradients of the model that `build` makes, to the end of `arguments`.

    `build` makes the same model each time: where memory runs out, the failed one is freed and training goes on from
    the last whole checkpoint, or from the start, with fewer rows at a time and as many an update. Where
    `arguments.output_dir` holds a whole checkpoint, training goes on from it, to the same weights bit for bit (on a
    CPU). The model may be a PEFT model, or any module that returns a `loss`.

    Raise RecipeError where nothing would train, NonFinite where a loss or a weight is NaN or infinite, CheckFailed
    where the run did not do what its method says (its checkpoint stays), OutOfMemory where a single row is too much.
    With several processes OutOfMemory also asks for a new start: `memory.known_micro_batch` then differs.
    """
    folder = Path(str(arguments.output_dir))
    while True:
        fitted = _fitted(arguments, course, known_micro_batch(folder))
        try:
            return _attempt(build, course, fitted)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        # The handler is left first: it holds the frames in which the failed model is.
        release()
        failed = MicroBatch(size=fitted.per_device_train_batch_size, accumulation=fitted.gradient_accumulation_steps)
        smaller = shrink(failed, folder, divisible=course.divisible)
        sentence = f"out of memory with {failed}; goes on with {smaller}"
        if processes.count() > 1:
            raise OutOfMemory(f"train: {sentence}, in new processes")
        progress.message(STAGE, sentence)


def _built(build: Build) -> Any:
    try:
        return build()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            "train: out of memory while the model was loaded; choose train.base: nf4, or a machine with more memory"
        ) from error


def _attempt(build: Build, course: Course, arguments: TrainingArguments) -> Trained:
    model = _built(build)
    counts = check_trainable(model, course.expected)
    if counts.trainable == 0:
        raise RecipeError("train: no parameter would train; name other train.lora.target_modules or train.trainable")
    names = trainable_names(model)
    sample = _batches(course, arguments)
    check_labels(course.examples, sample)
    _say_beginning(course, counts)
    record = Record(Path(str(arguments.output_dir)))
    losses, reached = SampleLoss(sample, record), Reached(names, record)
    trainer = _trainer(model, course, arguments, [losses, reached])
    _settle_mean(trainer, sample[0])
    sealed = _seal(trainer, course, sample)
    trainer.train(resume_from_checkpoint=resume_point(arguments))
    reached.check(names)
    whole = _whole(trainer, build)
    if whole is not None:
        check_finite(whole)
        if sealed:
            check_frozen(sealed, frozen_digests(whole, changing=course.expected.changing))
    check_loss(losses.before, losses.after)
    trained = _result(whole, trainer, course, counts, losses)
    progress.message(
        STAGE,
        f"trained {trained.steps:,} steps, {trainer.meter.sentence()}; the sample's loss went from "
        f"{trained.loss_before:.4g} to {trained.loss_after:.4g}",
    )
    return trained


def _result(whole: Any, trainer: WatchedTrainer, course: Course, counts: Counts, losses: SampleLoss) -> Trained:
    history = trainer.state.log_history
    logged = [entry["loss"] for entry in history if "loss" in entry][-LAST_LOSSES:]
    validation = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return Trained(
        model=whole,
        steps=trainer.state.global_step,
        tokens=round(sum(map(_tokens, course.examples)) * float(trainer.state.epoch or 0)),
        loss=sum(logged) / max(1, len(logged)),
        trainable_parameters=counts.trainable,
        loss_before=losses.before,
        loss_after=losses.after,
        validation_loss=validation[-1] if validation else None,
    )


def _trainer(model: Any, course: Course, arguments: TrainingArguments, checks: list[TrainerCallback]) -> WatchedTrainer:
    on_clock = arguments.save_strategy == "no"
    # The checks' own notes of a step are written before the marker that makes its checkpoint whole.
    callbacks = [Events(), *checks, Resumable(on_clock=on_clock), *course.callbacks]
    with tensorboard_in(course.logs):
        trainer = WatchedTrainer(
            model=model,
            args=arguments,
            train_dataset=list(course.examples),
            eval_dataset=list(course.validation) or None,
            data_collator=course.collate,
            callbacks=callbacks,
        )
    trainer.meter = Meter()
    trainer.remove_callback(PrinterCallback)  # the engine never prints
    if arguments.fsdp and not trainer.is_fsdp_enabled:
        raise RecipeError(
            "train.arguments: fsdp shards a model only among GPUs, and none is used here; leave it out, and the "
            "processes share the rows alone"
        )
    say_where(arguments.report_to, course.logs)
    return trainer


def _fitted(arguments: TrainingArguments, course: Course, known: MicroBatch | None) -> TrainingArguments:
    """The arguments with the micro-batch that is known to fit; validation takes no more rows at a time."""
    fitted = copy.copy(arguments)
    if course.validation:
        fitted.eval_strategy, fitted.do_eval = IntervalStrategy.EPOCH, True
    if known:
        fitted.per_device_train_batch_size = known.size
        fitted.gradient_accumulation_steps = known.accumulation
    fitted.per_device_eval_batch_size = min(fitted.per_device_eval_batch_size, fitted.per_device_train_batch_size)
    return fitted


def _batches(course: Course, arguments: TrainingArguments) -> list[Batch]:
    """The sample, in batches as they train."""
    sample, size = sample_of(course.examples), arguments.per_device_train_batch_size
    return [course.collate(sample[start : start + size]) for start in range(0, len(sample), size)]


def _settle_mean(trainer: WatchedTrainer, batch: Batch) -> None:
    """Find out whether the model divides its loss by the count that Trainer hands it; have the trainer do it if not.

    Trainer believes any model whose forward takes further names. Classifiers and regressors do, and ignore the count:
    their gradient would be as many times too large as there are micro-batches in an update, and processes.
    """
    heeds = False
    if trainer.model_accepts_loss_kwargs and processes.is_main():
        device = next(trainer.model.parameters()).device
        counts = ({**batch, "num_items_in_batch": torch.tensor(count)} for count in (1.0, 2.0))
        one, two = (loss_of(trainer.model, [counted], device=device) for counted in counts)
        heeds = one != two
    trainer.heeds_count = bool(processes.from_main(int(heeds)))
    trainer.model_accepts_loss_kwargs = True


def _seal(trainer: WatchedTrainer, course: Course, sample: list[Batch]) -> dict[str, str]:
    """The digests of what is frozen, in the process that can look at it afterwards."""
    if not processes.is_main():
        return {}
    if any(getattr(module, "hf_quantizer", None) for module in trainer.model.modules()):
        loss_of(trainer.model, sample[:1], device=trainer.args.device)  # may repack the weights in place, once
    return frozen_digests(trainer.model, changing=course.expected.changing)


def _whole(trainer: WatchedTrainer, build: Build) -> Any:
    """The model with all its weights in the main process; FSDP's parts are gathered into a model built afresh."""
    if not trainer.is_fsdp_enabled:
        return trainer.model
    state = trainer.accelerator.get_state_dict(trainer.model)
    if not processes.is_main():
        return None
    model = _built(build)
    model.load_state_dict(state)
    return model


def _tokens(example: Any) -> int:
    """Tokens of an example of any kind: those of its lists of ids."""
    lists = (getattr(example, name, None) for name in ("input_ids", "anchor", "positive", "negative"))
    return sum(len(ids) for ids in lists if ids is not None)


def _say_beginning(course: Course, counts: Counts) -> None:
    progress.message(
        STAGE,
        f"trains {counts.trainable:,} of {counts.total:,} parameters, in {counts.tensors:,} tensors, as method "
        f"{course.expected.method} says, on {len(course.examples):,} examples",
    )
