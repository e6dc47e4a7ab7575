"""The loop on cached features: what Trainer does around a model's step, without the backbone and without its cost.

A step is the mean loss over its rows, however they are cut into micro-batches and processes. The order of an epoch is
drawn from seed and epoch, the dropout of a step from seed and step. `argument_names.HONOURED` says which of
TrainingArguments' names are heeded; they mean what they mean to Trainer.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainingArguments

from pipeline import progress
from pipeline.argument_names import HONOURED
from pipeline.digests import digest_value
from pipeline.encoding import IGNORED
from pipeline.errors import DataError, NonFinite
from pipeline.training import feature_resume
from pipeline.training.feature_rows import Rows
from pipeline.training.feature_schedule import Schedule, adamw, clip, every, rate
from pipeline.training.model import check_finite
from pipeline.training.resume import EVERY, SHARE
from pipeline.training.watching import LAST_LOSSES, STAGE

SHOWN = 0.1  # seconds between events that say how far it is: a step takes less than telling of it
CLOCK = 16  # steps between two looks at the clock that asks for a checkpoint
SMALL = 1 << 22  # multiplications in a step below which a second thread costs more than it does
# Names that change nothing of the weights: a resumed run may have others.
UNSEEN = frozenset({
    "logging_first_step", "logging_steps", "logging_strategy", "per_device_eval_batch_size", "save_steps",
    "save_strategy", "save_total_limit", "use_cpu",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What a training came to: optimizer steps, rows seen, the mean of the last logged losses.

    Of the validation rows, where there are any: the loss, and of classes the share of labels that are met.
    """

    steps: int
    rows: int
    loss: float
    trainable_parameters: int
    validation_loss: float | None = None
    validation_accuracy: float | None = None


@dataclass(slots=True, kw_only=True)
class _Log:
    """The losses since the last one was logged, and those that were."""

    total: Tensor
    steps: int = 0
    logged: list[float] = field(default_factory=list)
    at: float = field(default_factory=time.perf_counter)
    rows: int = 0


def fit(module: nn.Module, rows: Rows, arguments: TrainingArguments, *, validation: Rows | None = None) -> Fitted:
    """Train what requires gradients of `module`, in place, on `rows`, to the end of `arguments`.

    `module(**rows.batch(…))` returns `loss` and `logits`. Where `arguments.output_dir` holds a whole checkpoint of this
    very training, it goes on from there, to the same weights bit for bit (on a CPU). Raise RecipeError or DataError
    before the first step, NonFinite where a loss or a weight is NaN or infinite.
    """
    loop = _Loop(module, rows, arguments)
    with _threads(loop), torch.random.fork_rng(devices=loop.cuda):
        done = loop.resume()
        for step, batch in loop.schedule.batches(done):
            loop.step(step, batch)
            if validation is not None and (step % loop.schedule.per_epoch == 0 or step == loop.schedule.steps):
                loop.validate(validation)
            loop.save_if_due(step)
    check_finite(module)
    return loop.fitted()


class _Loop:
    """The loop's parts and where it stands."""

    def __init__(self, module: nn.Module, rows: Rows, arguments: TrainingArguments) -> None:
        _ = arguments.device  # sets up the processes as Trainer would, once
        self.accelerator = Accelerator(cpu=arguments.use_cpu, mixed_precision="no")
        self.device = self.accelerator.device
        self.cuda = [self.device] if self.device.type == "cuda" else []
        self.schedule = Schedule.of(len(rows), arguments, self.accelerator.num_processes)
        if self.schedule.steps < 1:
            raise DataError(f"train: {len(rows)} rows make no batch; give more, or lower per_device_train_batch_size")
        self.rows, self.arguments = rows, arguments
        self.module = module.to(self.device)
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.optimizer = adamw(self.module, arguments)
        self.scheduler = rate(self.optimizer, arguments, self.schedule.steps)
        self.model = self.accelerator.prepare(self.module)
        self.log = _Log(total=torch.zeros((), device=self.device))
        self.found: tuple[float, float | None] | None = None
        self.model.train()
        self.random = torch.cuda.default_generators[self.device.index or 0] if self.cuda else torch.default_generator
        self.main = self.accelerator.is_main_process
        self.log_every = every(arguments.logging_strategy, arguments.logging_steps, self.schedule)
        self.save_every = every(arguments.save_strategy, arguments.save_steps, self.schedule)
        self.shown = self.saved = time.monotonic()
        self.cost = 0.0

    def step(self, step: int, batch: Tensor) -> None:
        """One optimizer step on the rows of a batch."""
        # torch.manual_seed would write down where it was called from, for GPUs that are not in use: a millisecond.
        self.random.manual_seed(((self.schedule.seed << 20) + step) * 1024 + self.accelerator.process_index)
        if self.schedule.processes == 1 and len(batch) <= self.schedule.micro:
            loss = self._loss(batch)
            # accelerator.backward would divide by the accumulation once more
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it so
            self.log.total += loss.detach()
        else:
            self._accumulate(batch)
        if self.arguments.max_grad_norm:
            clip(self.weights, self.arguments.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        for weight in self.weights:
            weight.grad = None
        self.log.steps += 1
        self.log.rows += len(batch)
        self._tell(step)

    def _loss(self, rows: Tensor) -> Tensor:
        batch = self.rows.batch(rows)
        if self.cuda:
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        loss: Tensor = self.model(**batch).loss
        return loss

    def _accumulate(self, batch: Tensor) -> None:
        """Micro-batches, each weighted by its share of the step's labels; DDP averages over the processes."""
        rank, processes = self.accelerator.process_index, self.schedule.processes
        labels = max(1, self.rows.judged(batch))
        parts = torch.split(batch, self.schedule.together)
        for number, part in enumerate(parts, start=1):
            mine = part.tensor_split(processes)[rank]
            weight = self.rows.judged(mine) / labels if len(mine) else 0.0
            last = number == len(parts)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                # Every process takes part in every average, with a row that weighs nothing if need be.
                loss = self._loss(mine if len(mine) else part[:1]) * weight
                (loss * processes).backward()  # type: ignore[no-untyped-call]  # torch leaves it so
            self.log.total += loss.detach()

    def _tell(self, step: int) -> None:
        last = step == self.schedule.steps
        logs = last or (self.log_every and step % self.log_every == 0)
        logs = logs or (step == 1 and self.arguments.logging_first_step)
        if self.main and (
            logs or time.monotonic() - self.shown >= SHOWN
        ):  # figures come after the step that they are of
            progress.step(STAGE, done=step, total=self.schedule.steps, unit="steps")
            self.shown = time.monotonic()
        if logs:
            self._tell_loss(step)

    def _tell_loss(self, step: int) -> None:
        loss = float(self.accelerator.reduce(self.log.total, "sum")) / self.log.steps
        if not math.isfinite(loss):
            raise NonFinite(f"train: the loss is {loss} at step {step}; lower train.arguments.learning_rate")
        now = time.perf_counter()
        if self.main:
            progress.metric(STAGE, "loss", loss)
            progress.metric(STAGE, "learning_rate", float(self.scheduler.get_last_lr()[0]))
            progress.metric(STAGE, "rows_per_second", self.log.rows / max(1e-9, now - self.log.at))
        logged = [*self.log.logged, loss][-LAST_LOSSES:]
        self.log = _Log(total=torch.zeros((), device=self.device), logged=logged, at=now)

    @torch.no_grad()
    def validate(self, rows: Rows) -> None:
        """Judge the validation rows, in every process alike."""
        self.module.eval()
        total, labels, met, classes = 0.0, 0, 0, False
        for part in torch.split(torch.arange(len(rows)), self.arguments.per_device_eval_batch_size):
            batch = {name: tensor.to(self.device) for name, tensor in rows.batch(part).items()}
            output, count = self.module(**batch), rows.judged(part)
            total, labels = total + float(output.loss) * count, labels + count
            if not batch["labels"].is_floating_point():
                classes = True
                right = output.logits.argmax(-1) == batch["labels"]
                met += int(right[batch["labels"] != IGNORED].sum())
        self.model.train()
        self.found = (total / max(1, labels), met / max(1, labels) if classes else None)
        if self.main:
            progress.metric(STAGE, "validation_loss", self.found[0])
            if classes:
                progress.metric(STAGE, "validation_accuracy", met / max(1, labels))

    def resume(self) -> int:
        """Go on from the newest whole checkpoint of this very training; return the steps that are done."""
        folder = Path(str(self.arguments.output_dir))
        checkpoint = feature_resume.newest(folder) if self.main else None
        self.accelerator.wait_for_everyone()
        if not self.main:  # after the first process has removed what is not whole
            checkpoint = feature_resume.newest(folder)
        if checkpoint is None:
            return 0
        state = feature_resume.read_state(checkpoint)
        if state["identity"] != self._identity():
            progress.message(STAGE, f"begins anew: {checkpoint.name} is of other rows or arguments")
            return 0
        feature_resume.restore(checkpoint, module=self.module, optimizer=self.optimizer, scheduler=self.scheduler)
        self.log.total += state["total"] / self.schedule.processes
        self.log.steps, self.log.logged, self.found = state["steps"], state["logged"], state["found"]
        progress.message(STAGE, f"resumes from {checkpoint.name}")
        return int(state["step"])

    def save_if_due(self, step: int) -> None:
        """Write a checkpoint where the arguments or the clock ask for one; the end needs none."""
        if step == self.schedule.steps or not self._due(step):
            return
        total = float(self.accelerator.reduce(self.log.total, "sum"))
        if not math.isfinite(total):
            return  # the next loss that is logged ends the run; the checkpoint before it stays
        began = time.monotonic()
        if self.main:
            said = {
                "identity": self._identity(), "total": total, "steps": self.log.steps, "logged": self.log.logged,
                "found": self.found,
            }  # fmt: skip
            feature_resume.save(
                Path(str(self.arguments.output_dir)),
                step,
                module=self.module,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                said=said,
                keep=self.arguments.save_total_limit or 2,
            )
            progress.message(STAGE, f"can resume from step {step}")
        self.saved = time.monotonic()
        self.cost = self.saved - began

    def _due(self, step: int) -> bool:
        if self.save_every:
            return step % self.save_every == 0
        if step % CLOCK:
            return False
        due = time.monotonic() - self.saved >= max(EVERY, SHARE * self.cost)
        if self.schedule.processes > 1:  # one clock for all
            return bool(self.accelerator.reduce(torch.tensor(float(due and self.main), device=self.device), "sum"))
        return due

    def _identity(self) -> str:
        """What a checkpoint must share with this training to be gone on from."""
        shapes = {name: list(weight.shape) for name, weight in self.module.named_parameters() if weight.requires_grad}
        used = {name: str(getattr(self.arguments, name)) for name in HONOURED - UNSEEN}
        return digest_value([self.schedule.rows, self.schedule.processes, self.arguments.seed, shapes, used])

    def fitted(self) -> Fitted:
        """What it came to."""
        loss, accuracy = self.found or (None, None)
        steps, epochs = self.schedule.steps, self.schedule.steps // self.schedule.per_epoch
        size = self.schedule.together * self.schedule.accumulation
        return Fitted(
            steps=steps,
            rows=epochs * self.schedule.used + size * (steps % self.schedule.per_epoch),
            loss=sum(self.log.logged) / max(1, len(self.log.logged)),
            trainable_parameters=sum(weight.numel() for weight in self.weights),
            validation_loss=loss,
            validation_accuracy=accuracy,
        )


@contextlib.contextmanager
def _threads(loop: _Loop) -> Iterator[None]:
    """One thread for a step that is too small to share."""
    before = torch.get_num_threads()
    work = sum(weight.numel() for weight in loop.weights) * loop.schedule.micro
    if not loop.cuda and work <= SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
