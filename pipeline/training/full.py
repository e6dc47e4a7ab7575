"""Full training: every weight, or those that the recipe names, in float32 while they train."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from pipeline.checkpoint import Checkpoint
from pipeline.errors import RecipeError, UnsupportedFormat
from pipeline.shard_writer import ShardWriter
from pipeline.shards import DTYPES, ShardReader
from pipeline.training.model import Loaded, tied_names


def freeze_but(
    model: Any, patterns: Sequence[str], *, also: Collection[str] = (), only: bool = False
) -> frozenset[str]:
    """Freeze what neither `also` holds nor one of `patterns` names; return the names of the parameters left to train.

    A pattern is shell-style, `*` for any text. Where there is none, all are left, or with `only` those of `also`. Raise
    RecipeError for a pattern that names no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise RecipeError(
                f"train.trainable: {pattern} names no weight of the model, which are called like {names[0]}; correct it"
            )
    everything = not patterns and not only
    chosen = {
        name for name in names if name in also or everything or any(fnmatch.fnmatchcase(name, p) for p in patterns)
    }
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in chosen)
    return frozenset(chosen)


def check_names(loaded: Loaded, base: Checkpoint) -> None:
    """Raise UnsupportedFormat where a weight of the model has no place among the base's tensors."""
    state = {name: tensor.to("meta") for name, tensor in loaded.model.state_dict().items()}
    known = base.tensors.keys() | tied_names(loaded.model) | loaded.new
    homeless = sorted(revert_weight_conversion(loaded.model, state).keys() - known)
    if homeless:
        raise UnsupportedFormat(
            f"{base.path}: does not store {homeless[0]} by that name, so it could not be written back; use method lora"
        )


def write_tuned(
    state: Mapping[str, torch.Tensor], base: Checkpoint, folder: Path, *, new: Sequence[str], dropped: Sequence[str]
) -> None:
    """Write `state` under the base's names, shapes, dtypes and order, then what is `new`; memory beside it: one tensor.

    `state` has the checkpoint's names. A tensor of the base that it lacks is copied as it is, but for modules that are
    `dropped`; one of another shape takes its own.
    """
    shapes = {
        name: (info.dtype, tuple(state[name].shape) if name in state else info.shape)
        for name, info in base.tensors.items()
        if name.rpartition(".")[0] not in dropped
    }
    floats = [info for info in base.tensors.values() if info.dtype in {"BF16", "F16", "F32"}]
    common = max(floats, key=lambda info: info.end - info.start).dtype  # not that of a packed weight's scales
    shapes |= {name: (common, tuple(state[name].shape)) for name in sorted(new) if name not in shapes}
    with ShardReader(base) as reader, ShardWriter(folder, shapes) as writer:
        for name, (dtype, _) in shapes.items():
            tensor = state[name] if name in state else reader[name]
            writer.write(name, tensor.detach().to(DTYPES[dtype]))


def stored_state(model: Any) -> Mapping[str, torch.Tensor]:
    """The model's weights by the names that its checkpoints have."""
    found: Mapping[str, torch.Tensor] = revert_weight_conversion(model, model.state_dict())
    return found
