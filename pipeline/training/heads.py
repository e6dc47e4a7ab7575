"""A classifier's own head: what of the model it is, how it is kept by itself, and how it joins a backbone again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError
from pipeline.training.full import stored_state, write_tuned
from pipeline.training.model import Loaded
from pipeline.training.task import Task, write_config

WEIGHTS = "head.safetensors"


def write_head(loaded: Loaded, trained: frozenset[str], folder: Path) -> None:
    """Write the tensors named `trained`, float32, and the task, to `folder`."""
    state = stored_state(loaded.model)
    if strange := sorted(trained - state.keys()):
        raise CheckpointError(f"{strange[0]}: goes by another name in a checkpoint; use method full or lora instead")
    tensors = {name: state[name].detach().to("cpu", torch.float32).contiguous() for name in sorted(trained)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    loaded.task.write(folder)


def join(base: Checkpoint, head: Path, folder: Path) -> None:
    """Write the backbone `base`, dense or quantized, with the trained head, to `folder`: weights and config.json.

    The backbone's tensors are its own bytes, but for those that trained too; what its class has no place for is left
    out. Raise CheckpointError where a trained tensor is packed in `base`.
    """
    tensors: dict[str, Any] = load_file(head / WEIGHTS)
    task = Task.read(head)
    new = [name for name in tensors if name not in base.tensors]
    packed = {name.rpartition(".")[0] for name in base.tensors}
    if lost := [name for name in new if name.rpartition(".")[0] in packed]:
        raise CheckpointError(f"{head}: holds {lost[0]}, which is packed in {base.path}; join it to dense weights")
    write_tuned(tensors, base, folder, new=new, dropped=task.dropped)
    write_config(base, task, folder)
