"""Checkpoints of the loop on cached features: safetensors and JSON, each whole or not there.

The random order of an epoch and the dropout of a step come from seed and number alone, so weights, optimizer and
schedule are all that a resume needs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pipeline.training.resume import last_complete, mark_complete

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def save(
    folder: Path,
    step: int,
    *,
    module: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    said: Mapping[str, Any],
    keep: int,
) -> None:
    """Write checkpoint-<step>, whole before it has its name, and remove all but the newest `keep`."""
    part = folder / f".checkpoint-{step}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    schedule = {name: value for name, value in scheduler.state_dict().items() if name != "lr_lambdas"}
    rates = [group["lr"] for group in optimizer.param_groups]
    state = {**said, "step": step, "schedule": schedule, "rates": rates}
    save_file(_weights(module), part / WEIGHTS)
    save_file(_moments(optimizer), part / OPTIMIZER)
    (part / STATE).write_text(json.dumps(state, sort_keys=True), encoding="utf-8")
    for path in part.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    mark_complete(part)
    shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
    part.rename(folder / f"checkpoint-{step}")
    older = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in older[max(1, keep) :]:
        shutil.rmtree(path)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None; others, and what a kill left of one, are removed."""
    for part in folder.glob(".checkpoint-*.part"):
        shutil.rmtree(part)
    return last_complete(folder)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What was said when it was saved, `step` among it."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state


def restore(checkpoint: Path, *, module: nn.Module, optimizer: Optimizer, scheduler: LambdaLR) -> None:
    """Put weights, optimizer and schedule back as they were saved."""
    state = read_state(checkpoint)
    weights = load_file(checkpoint / WEIGHTS)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.requires_grad:
                weight.copy_(weights[name])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(checkpoint / OPTIMIZER).items():
        number, _, kind = name.partition(".")
        moments.setdefault(int(number), {})[kind] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for group, rate in zip(optimizer.param_groups, state["rates"], strict=True):
        group["lr"] = rate
    scheduler.load_state_dict({**state["schedule"], "lr_lambdas": [None] * len(scheduler.lr_lambdas)})


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: weight.detach().cpu().contiguous() for name, weight in module.named_parameters() if weight.requires_grad
    }


def _moments(optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{number}.{kind}": tensor.detach().cpu().contiguous()
        for number, kinds in optimizer.state_dict()["state"].items()
        for kind, tensor in kinds.items()
    }
