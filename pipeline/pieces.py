"""The dense checkpoint as pieces: each of its tensors, and the group that it is made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.shards import TensorGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A tensor of the dense checkpoint, of `dtype` and `shape`, and the group that it is made from.

    `finish`, where there is one, turns the whole weight that the format gives (float32, or a dense tensor as it is
    stored) into the tensor, perhaps as a view; it needs at most one more copy. `divided_by`, where there is one, is a
    tensor [I] that each row is divided by before it is anything else: scales of an activation that come before it.
    """

    name: str
    group: TensorGroup
    dtype: torch.dtype
    shape: tuple[int, ...]
    finish: Callable[[Tensor], Tensor] | None = None
    divided_by: Tensor | None = None
