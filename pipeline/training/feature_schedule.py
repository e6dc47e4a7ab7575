"""What drives a step of the loop on cached features: its rows, the optimizer, the learning rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from pipeline.errors import RecipeError

# Trainer's own: biases and norms do not decay.
NO_DECAY = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Which rows each step sees. `micro` rows go through the module at once in each process."""

    rows: int
    micro: int
    processes: int
    accumulation: int
    epochs: float
    most: int
    drop_last: bool
    seed: int

    @staticmethod
    def of(rows: int, arguments: TrainingArguments, processes: int) -> Schedule:
        """The schedule that TrainingArguments describe."""
        return Schedule(
            rows=rows,
            micro=arguments.per_device_train_batch_size,
            processes=processes,
            accumulation=arguments.gradient_accumulation_steps,
            epochs=arguments.num_train_epochs,
            most=arguments.max_steps,
            drop_last=arguments.dataloader_drop_last,
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
        )

    @property
    def together(self) -> int:
        """Rows that all processes see at once."""
        return self.micro * self.processes

    @property
    def used(self) -> int:
        """Rows that an epoch sees."""
        return self.rows - self.rows % self.together if self.drop_last else self.rows

    @property
    def per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.used // (self.together * self.accumulation))

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return self.most if self.most > 0 else math.ceil(self.epochs * self.per_epoch)

    def order(self, epoch: int) -> Tensor:
        """The numbers of the rows, int64, in the order in which an epoch sees them."""
        generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
        return torch.randperm(self.rows, generator=generator)[: self.used]

    def batches(self, done: int) -> Iterator[tuple[int, Tensor]]:
        """(step, its rows) of every step after `done`."""
        for epoch in itertools.count(done // self.per_epoch):
            rows = torch.split(self.order(epoch), self.together * self.accumulation)
            for step, batch in enumerate(rows, start=epoch * self.per_epoch + 1):
                if step > self.steps:
                    return
                if step > done:
                    yield step, batch


def adamw(module: nn.Module, arguments: TrainingArguments) -> torch.optim.AdamW:
    """AdamW as Trainer makes it; one group where nothing decays, since each costs a call."""
    weights = {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
    if not weights:
        raise RecipeError("train: no parameter would train; use method head or projector")
    decaying = set(get_parameter_names(module, [nn.LayerNorm], list(NO_DECAY)))
    groups = [
        {"params": [weight for name, weight in weights.items() if name in decaying],
         "weight_decay": arguments.weight_decay},
        {"params": [weight for name, weight in weights.items() if name not in decaying], "weight_decay": 0.0},
    ]  # fmt: skip
    return torch.optim.AdamW(
        [group for group in groups if group["params"]] if arguments.weight_decay else list(weights.values()),
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=0.0,
        fused=True,
    )


def rate(optimizer: torch.optim.AdamW, arguments: TrainingArguments, steps: int) -> LambdaLR:
    """The learning rate over the steps, as Trainer has it; raise RecipeError where it needs an evaluation."""
    made = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    if not isinstance(made, LambdaLR):
        raise RecipeError(
            f"train.arguments: lr_scheduler_type {_plain(arguments.lr_scheduler_type)} is steered by an evaluation; "
            "choose another, or use train.engine: trainer"
        )
    return made


def every(strategy: Any, steps: float, schedule: Schedule) -> int:
    """Steps between two of a kind by a strategy and a number, which below one is a share of all; 0 for none."""
    match _plain(strategy):
        case "epoch":
            return schedule.per_epoch
        case "steps":
            return max(1, math.ceil(schedule.steps * steps) if steps < 1 else int(steps))
    return 0


@torch.no_grad()
def clip(weights: Sequence[Tensor], most: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` to the last bit, without the dispatch that costs more than the arithmetic."""
    grads = [weight.grad for weight in weights if weight.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor)


def _plain(value: Any) -> str:
    """What a recipe would say for one of transformers' enumerations."""
    return str(getattr(value, "value", value))
