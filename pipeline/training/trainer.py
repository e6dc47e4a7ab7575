"""The training loop: transformers' Trainer, resumed after a kill, whose progress is events."""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from pipeline import progress
from pipeline.encoding import Sequence, padded
from pipeline.errors import NonFinite, RecipeError
from pipeline.training.model import check_finite
from pipeline.training.resume import Resumable, last_complete

STAGE = "train"
LAST_LOSSES = 10  # logged losses whose mean is called the training loss: one alone is as noisy as its batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training came to: optimizer steps, tokens seen (padding left out), the mean of the last logged losses."""

    steps: int
    tokens: int
    loss: float
    trainable_parameters: int


def train(
    model: Any,
    sequences: Items[Sequence],
    arguments: TrainingArguments,
    *,
    pad_token: int,
    callbacks: Items[TrainerCallback] = (),
) -> Trained:
    """Train the parameters of `model` that require gradients, in place, to the end of `arguments`.

    Where `arguments.output_dir` holds a whole checkpoint, training goes on from it, to the same weights bit for bit (on
    a CPU). Raise RecipeError where nothing would train, NonFinite where a loss or a weight is NaN or infinite.
    """
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in model.parameters())
    if trainable == 0:
        raise RecipeError("train: no parameter would train; name other train.lora.target_modules")
    progress.message(STAGE, f"trains {trainable:,} of {total:,} parameters on {len(sequences):,} sequences")
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(sequences),
        data_collator=_Padded(pad_token=pad_token),
        callbacks=[_Events(), Resumable(on_clock=arguments.save_strategy == "no"), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)  # the engine never prints
    trainer.train(resume_from_checkpoint=_resume_point(arguments))
    check_finite(model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-LAST_LOSSES:]
    return Trained(
        steps=trainer.state.global_step,
        tokens=round(sum(len(sequence.input_ids) for sequence in sequences) * float(trainer.state.epoch or 0)),
        loss=sum(losses) / max(1, len(losses)),
        trainable_parameters=trainable,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Padded:
    """Trainer's collator: `encoding.padded` with the tokenizer's padding."""

    pad_token: int

    def __call__(self, batch: list[Sequence]) -> dict[str, torch.Tensor]:
        return padded(batch, pad_token=self.pad_token)


class _Events(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Turns Trainer's callbacks into events, and stops at the first loss that is not finite."""

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say how far it is; ask for the last steps' loss at the end, which Trainer logs only at round numbers."""
        progress.step(STAGE, done=state.global_step, total=state.max_steps, unit="steps")
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **found: Any) -> None:
        """Say the loss; raise NonFinite where it is NaN or infinite."""
        logs = found.get("logs") or {}
        if "loss" in logs:
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise NonFinite(
                    f"train: the loss is {loss} at step {state.global_step}; lower train.arguments.learning_rate"
                )
            progress.metric(STAGE, "loss", loss)


def _resume_point(arguments: TrainingArguments) -> str | None:
    checkpoint = last_complete(Path(str(arguments.output_dir)))
    if checkpoint is None:
        return None
    progress.message(STAGE, f"resumes from {checkpoint.name}")
    return str(checkpoint)
