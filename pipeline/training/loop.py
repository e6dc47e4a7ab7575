"""transformers' Trainer with what Requant adds to its loop: throughput, evaluation without a trace, a sample's loss."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.encoding import IGNORED
from pipeline.training.checks import Batch, Record, check_loss, loss_of
from pipeline.training.watching import Meter


class WatchedTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Trainer, which measures throughput, evaluates without a trace, and stops where it has nothing left to do."""

    meter: Meter
    heeds_count = True  # whether the model divides its loss by the labels of the whole update

    def compute_loss(self, model: Any, inputs: Any, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Any:
        """The loss, as its micro-batch's share of the whole update's mean."""
        if self.heeds_count or num_items_in_batch is None:
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        share = (inputs["labels"] != IGNORED).sum() / num_items_in_batch
        if self.args.average_tokens_across_devices:  # then the count is of all processes, whose gradients are averaged
            share = share * self.accelerator.num_processes
        return super().compute_loss(model, inputs) * share

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Note what goes through."""
        self.meter.count(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def prediction_step(self, model: Any, inputs: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, None, None]:
        """The loss alone, asked for as in training: Trainer would look for labels by name."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Evaluate, and leave the random state alone: a run resumed at an epoch's end has not evaluated."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            found: dict[str, float] = super().evaluate(*arguments, **options)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add throughput and memory, for every reporter to see."""
        if "loss" in logs:
            logs |= self.meter.figures()
        super().log(logs, start_time)

    def _run_epoch(self, **options: Any) -> None:
        """Do nothing where a run resumed after its last step: Trainer would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**options)


class SampleLoss(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """The sample's loss before the first step, kept for a run that resumes, and after the last.

    Measured where the model is on its device and wrapped as it trains; under FSDP every process must take part.
    """

    def __init__(self, batches: list[Batch], record: Record) -> None:
        self._batches, self._record = batches, record
        self.before = self.after = float("nan")

    def on_train_begin(
        self, args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **found: Any
    ) -> None:
        """Measure the loss, or read what was measured before a kill."""
        if (kept := self._record.get("loss_before")) is not None:
            self.before = kept
            return
        self.before = loss_of(found["model"], self._batches, device=args.device)
        check_loss(self.before)
        self._record.put(loss_before=self.before)

    def on_train_end(
        self, args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **found: Any
    ) -> None:
        """Measure it again."""
        self.after = loss_of(found["model"], self._batches, device=args.device)
