"""Full training: every weight, kept in float32 while it trains, written back in the base's own dtypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from pipeline.checkpoint import Checkpoint
from pipeline.errors import UnsupportedFormat
from pipeline.shard_writer import ShardWriter
from pipeline.shards import DTYPES, ShardReader
from pipeline.training.model import tied_names


def master_dtype(_base: Checkpoint, _device: str) -> torch.dtype:
    """float32: an update smaller than half a step of bf16 (1/512 of the weight) would round to nothing."""
    return torch.float32


def check_names(model: Any, base: Checkpoint) -> None:
    """Raise UnsupportedFormat where a weight of the model has no place among the base's tensors."""
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    homeless = sorted(revert_weight_conversion(model, state).keys() - base.tensors.keys() - tied_names(model))
    if homeless:
        raise UnsupportedFormat(
            f"{base.path}: does not store {homeless[0]} by that name, so it could not be written back; use method lora"
        )


def write_tuned(model: Any, base: Checkpoint, folder: Path) -> None:
    """Write the model's weights under the base's names, shapes, dtypes and order; memory beside the model: one tensor.

    A tensor that the base stores and the architecture computes for itself is copied as it is.
    """
    state = revert_weight_conversion(model, model.state_dict())
    shapes = {name: (info.dtype, info.shape) for name, info in base.tensors.items()}
    with ShardReader(base) as reader, ShardWriter(folder, shapes) as writer:
        for name, (dtype, _) in shapes.items():
            tensor: torch.Tensor = state[name] if name in state else reader[name]
            writer.write(name, tensor.detach().to(DTYPES[dtype]))
