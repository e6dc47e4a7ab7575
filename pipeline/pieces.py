"""The dense checkpoint as pieces: each of its tensors, and the group that it is made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.shards import DTYPE_NAMES, TensorGroup


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The pieces in the order in which they are written; `dropped` maps a stored tensor to why it is left out.

    Packed tensors are dropped under the name of the dense one that they would become. `problems` is what keeps the
    checkpoint from becoming dense: empty for one that can be written. `described` is the folder with its config.json
    and tokenizer.
    """

    pieces: tuple[Piece, ...]
    dropped: Mapping[str, str]
    problems: tuple[InputError, ...]
    described: Path

    @property
    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor → safetensors dtype and shape, as a ShardWriter takes them."""
        return {piece.name: (DTYPE_NAMES[piece.dtype], piece.shape) for piece in self.pieces}
