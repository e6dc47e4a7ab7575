"""What every training run is held against, whatever its method: a violated check stops the stage in one sentence.

The trainable parameters are those that the method says; what is frozen is byte-identical afterwards (frozen.py); the
labels are not all masked; the loss of a fixed sample is finite and fell; a gradient reached every trainable tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.encoding import IGNORED
from pipeline.errors import CheckFailed, NonFinite
from pipeline.training import processes
from pipeline.training.frozen import and_others

SAMPLE = 16  # training sequences whose loss is measured before and after
Batch = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expectation:
    """What a method says of a model: the parameters that train, and the buffers that change by themselves."""

    method: str
    trainable: Callable[[str], bool] | frozenset[str]
    changing: Callable[[str], bool] = lambda _: False

    def trains(self, name: str) -> bool:
        """Whether the method trains the parameter of that name."""
        return name in self.trainable if isinstance(self.trainable, frozenset) else self.trainable(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Trainable tensors, the parameters in them, and the model's parameters in all."""

    tensors: int
    trainable: int
    total: int


def check_trainable(model: torch.nn.Module, expected: Expectation) -> Counts:
    """Count what trains; raise CheckFailed where it is not exactly what the method says."""
    names = dict(model.named_parameters())
    trainable = {name for name, parameter in names.items() if parameter.requires_grad}
    wanted = {name for name in names if expected.trains(name)}
    if isinstance(expected.trainable, frozenset):
        wanted |= expected.trainable
    for odd, found in ((sorted(trainable - wanted), "trains"), (sorted(wanted - trainable), "does not train")):
        if odd:
            raise CheckFailed(
                f"train: {odd[0]}{and_others(len(odd) - 1)} {found}, which is not what method {expected.method} says "
                f"({len(wanted):,} tensors train by the method, {len(trainable):,} in the model); report this with the "
                "recipe"
            )
    return Counts(
        tensors=len(trainable),
        trainable=sum(_size(names[name]) for name in trainable),
        total=sum(map(_size, names.values())),
    )


def check_labels(examples: Iterable[Any], batches: Iterable[Batch]) -> None:
    """Raise CheckFailed where every label is masked (-100), in the examples or as the collator hands them on."""
    tokens = [labels for example in examples if isinstance(labels := getattr(example, "labels", None), list)]
    if tokens and not any(label != IGNORED for labels in tokens for label in labels):
        raise CheckFailed(
            f"train: every label of all {len(tokens):,} training sequences is masked ({IGNORED}), so nothing would be "
            "learned; look at the rows' answers and at the chat template"
        )
    handed = [batch["labels"] for batch in batches if isinstance(batch.get("labels"), torch.Tensor)]
    if handed and not any(bool((labels != IGNORED).any()) for labels in handed):
        raise CheckFailed(
            f"train: every label of the sampled batches is masked ({IGNORED}), so nothing would be learned; report "
            "this with the recipe"
        )


def sample_of(examples: Items[Any], most: int = SAMPLE) -> list[Any]:
    """At most `most` examples, evenly spaced, the first and the last among them."""
    count = min(most, len(examples))
    return [examples[round(i * (len(examples) - 1) / max(1, count - 1))] for i in range(count)]


def loss_of(model: Any, batches: Iterable[Batch], *, device: torch.device) -> float:
    """The model's mean loss over batches in evaluation mode, each weighted by its labels; no random state moves."""
    was_training = model.training
    model.eval()
    total = weights = 0.0
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            for batch in batches:
                found = model(**{name: _to(value, device) for name, value in batch.items()})
                weight = _weight(batch.get("labels"))
                total += weight * float(found["loss"] if isinstance(found, Mapping) else found[0])
                weights += weight
    finally:
        model.train(was_training)
    return total / weights


def check_loss(before: float, after: float | None = None) -> None:
    """Raise NonFinite where a loss is NaN or infinite, CheckFailed where it did not fall."""
    for loss, when in ((before, "before"), (after, "after")):
        if loss is not None and not math.isfinite(loss):
            raise NonFinite(
                f"train: the loss of the sampled training sequences is {loss} {when} training; "
                + ("look at the base's weights" if when == "before" else "lower train.arguments.learning_rate")
            )
    if after is not None and after >= before:
        raise CheckFailed(
            f"train: the loss of the sampled training sequences did not fall ({before:.6g} before, {after:.6g} after); "
            "change train.arguments.learning_rate, or train longer"
        )


class Record:
    """What checks must know again after a kill: a small JSON file beside the checkpoints."""

    NAME = "checks.json"

    def __init__(self, folder: Path) -> None:
        self._path = folder / self.NAME
        try:
            self._values: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._values = {}

    def get(self, name: str) -> Any:
        """What was kept, or None."""
        return self._values.get(name)

    def put(self, **values: Any) -> None:
        """Keep values, in one rename; the main process alone writes."""
        self._values |= values
        if not processes.is_main():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".part")
        with beside.open("w", encoding="utf-8") as file:
            json.dump(self._values, file)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(self._path)


class Reached(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Notes which trainable tensors a gradient has reached.

    Reached is a gradient that is not zero, once an update has moved the weights: before that LoRA's B is zero, and A's
    gradient with it. A run of a single update is asked only for a gradient that is there.
    """

    def __init__(self, names: Iterable[str], record: Record) -> None:
        self._record = record
        self._without: set[str] = set(names)  # no gradient at all
        self._zero = set(self._without)  # none that is not zero
        self._moved = False
        self._judged = False  # by an update after the first that moved anything
        if kept := record.get("gradients"):
            self._without, self._zero = set(kept["without"]), set(kept["zero"])
            self._moved, self._judged = kept["moved"], kept["judged"]

    def on_pre_optimizer_step(
        self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **found: Any
    ) -> None:
        """Look at the gradients of what none has reached yet."""
        waiting = self._without | self._zero
        if waiting:
            gradients = {
                name: gradient
                for full, parameter in found["model"].named_parameters()
                if (name := _own_name(full)) in waiting and (gradient := _local(parameter.grad)) is not None
            }
            self._without -= gradients.keys()
            self._zero -= _nonzero(gradients)
        self._judged |= self._moved
        self._moved |= any(group["lr"] > 0 for group in found["optimizer"].param_groups)

    def on_save(self, _args: TrainingArguments, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        """Keep what is known, for the run that resumes."""
        kept = {"without": sorted(self._without), "zero": sorted(self._zero)}
        self._record.put(gradients={**kept, "moved": self._moved, "judged": self._judged})

    def check(self, names: Items[str]) -> None:
        """Raise CheckFailed where no gradient reached one of `names` in any process."""
        missed = self._zero if self._judged else self._without
        reached = processes.anywhere([name not in missed for name in names])
        never = [name for name, hit in zip(names, reached, strict=True) if not hit]
        if never:
            raise CheckFailed(
                f"train: no gradient reached {never[0]}{and_others(len(never) - 1)} of {len(names):,} trainable "
                "tensors; leave out what the loss does not depend on, or train longer"
            )


def trainable_names(model: torch.nn.Module) -> list[str]:
    """The parameters that train, by name and in order."""
    return [_own_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _own_name(name: str) -> str:
    """A parameter's name without what FSDP and torch.compile put into it."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")


def _local(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """The part of a gradient that this process holds, if it holds any."""
    if gradient is not None and hasattr(gradient, "to_local"):
        gradient = gradient.to_local()
    return gradient if gradient is not None and gradient.numel() else None


def _nonzero(gradients: Mapping[str, torch.Tensor]) -> set[str]:
    """The names of gradients that are not zero, asked of the device once."""
    if not gradients:
        return set()
    device = next(iter(gradients.values())).device
    found = torch.stack([gradient.count_nonzero().to(device) for gradient in gradients.values()])
    return {name for name, count in zip(gradients, found.tolist(), strict=True) if count}


def _size(parameter: torch.nn.Parameter) -> int:
    """Weights in a parameter; those of bitsandbytes' 4-bit ones lie two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _weight(labels: Any) -> float:
    return float((labels != IGNORED).sum()) if isinstance(labels, torch.Tensor) else 1.0
