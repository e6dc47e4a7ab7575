"""What a training says while it runs: how far it is, loss, learning rate, throughput, memory."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline import progress
from pipeline.errors import NonFinite
from pipeline.training import processes

STAGE = "train"
LAST_LOSSES = 10  # logged losses whose mean is called the training loss: one alone is as noisy as its batches
# Trainer's name for a figure → the event's.
FIGURES: Mapping[str, str] = {
    "loss": "loss", "learning_rate": "learning_rate", "grad_norm": "gradient_norm", "eval_loss": "validation_loss",
    "tokens_per_second": "tokens_per_second", "rows_per_second": "rows_per_second", "resident_bytes": "resident_bytes",
    "peak_bytes": "peak_bytes", "cuda_peak_bytes": "cuda_peak_bytes",
}  # fmt: skip
_TENSORBOARD_FOLDER = "TENSORBOARD_LOGGING_DIR"  # what transformers' callback reads


class Meter:
    """Tokens and rows that went through the model, and how fast since the last look."""

    def __init__(self) -> None:
        self._began = self._looked = time.monotonic()
        self._tokens: Any = 0  # a tensor once batches bring masks: adding on the device waits for nothing
        self._rows = 0
        self._all = {"tokens": 0, "rows": 0}

    def count(self, batch: Mapping[str, Any]) -> None:
        """Note one micro-batch; tokens are what the attention masks leave."""
        masks = [value for name, value in batch.items() if name.endswith("attention_mask")]
        self._tokens = self._tokens + sum(mask.sum() for mask in masks)
        self._rows += next(
            (len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()), 0
        )

    def figures(self) -> dict[str, float]:
        """Throughput of all processes since the last look, and memory of this one, by Trainer's kind of names."""
        now = time.monotonic()
        seconds, tokens, rows = max(now - self._looked, 1e-9), int(self._tokens) * processes.count(), self._rows
        rows *= processes.count()
        self._all["tokens"] += tokens
        self._all["rows"] += rows
        self._looked, self._tokens, self._rows = now, 0, 0
        speed = {"tokens_per_second": tokens / seconds} if tokens else {"rows_per_second": rows / seconds}
        return speed | memory()

    def sentence(self) -> str:
        """What went through since the beginning, and how fast."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        unit = "tokens" if self._all["tokens"] else "rows"
        return f"{self._all[unit]:,} {unit} in {seconds:.0f} s ({self._all[unit] / seconds:,.0f} {unit}/s)"


def memory() -> dict[str, float]:
    """Bytes that this process holds, the most that it held, and the most that it had allocated on a GPU."""
    found = {
        "resident_bytes": float(psutil.Process().memory_info().rss),
        "peak_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
    }
    if torch.cuda.is_available():
        found["cuda_peak_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


class Events(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Turns Trainer's callbacks into events, and stops at the first loss that is not finite."""

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say how far it is; ask for the last steps' loss at the end, which Trainer logs only at round numbers."""
        progress.step(STAGE, done=state.global_step, total=state.max_steps, unit="steps")
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, _args: TrainingArguments, state: TrainerState, _control: TrainerControl, **found: Any) -> None:
        """Say the figures; raise NonFinite where a loss is NaN or infinite."""
        logs = found.get("logs") or {}
        for name, called in FIGURES.items():
            if name in logs:
                value = float(logs[name])
                if name.endswith("loss") and not math.isfinite(value):
                    raise NonFinite(
                        f"train: the {called.replace('_', ' ')} is {value} at step {state.global_step}; lower "
                        "train.arguments.learning_rate"
                    )
                progress.metric(STAGE, called, value)


@contextlib.contextmanager
def tensorboard_in(folder: Path | None) -> Iterator[None]:
    """Have the TensorBoard callbacks made in the block write to `folder`, unless the user's environment names one."""
    if folder is None or _TENSORBOARD_FOLDER in os.environ:
        yield
        return
    os.environ[_TENSORBOARD_FOLDER] = str(folder)
    try:
        yield
    finally:
        del os.environ[_TENSORBOARD_FOLDER]


def say_where(reporters: list[str], folder: Path | None) -> None:
    """Say how to look at what TensorBoard was told."""
    place = os.environ.get(_TENSORBOARD_FOLDER, folder)
    if "tensorboard" in reporters and place and processes.is_main():
        progress.message(STAGE, f"watch it with: tensorboard --logdir {place}")


@contextlib.contextmanager
def written_to(folder: Path | None) -> Iterator[None]:
    """Have TensorBoard, where it is installed, told of the block's figures: for a loop that is not Trainer's."""
    if folder is None or not processes.is_main() or importlib.util.find_spec("tensorboard") is None:
        yield
        return
    from torch.utils.tensorboard import SummaryWriter

    done = 0
    with SummaryWriter(str(folder)) as writer:

        def tell(event: progress.Event) -> None:
            nonlocal done
            if isinstance(event, progress.Step):
                done = event.done
            elif isinstance(event, progress.Metric):
                writer.add_scalar(f"train/{event.name}", event.value, done)

        say_where(["tensorboard"], folder)
        with progress.shown_by(tell):
            yield
