"""AWQ, in the GEMV layout.

On disk (AutoAWQ 0.2.9, modules/linear/gemv.py `WQLinear_GEMV.from_linear`), I in and O out features, 4 bits, G groups
of I / group size inputs, Z >= ceil(G / 8) words, rounded up to whole steps of its kernel:

- `qweight`: int32 [O, I / 8]; nibble k of word j is input 8 j + k.
- `qzeros`: int32 [O, Z], laid alike along the groups, stored as they are.
- `scales`: float16 [O, 8 Z].

The first G of each row count, the others are padding. W = (code - zero) * scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.formats.awq import groups_of
from pipeline.formats.components import ALL, FLOATS, WORDS, require, require_finite
from pipeline.formats.words import unpack, unpack_floats
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:
    """[O, I], from qweight's shape, checked against those of qzeros and scales."""
    outputs, words = require(group, "qweight", dtypes=WORDS, shape=(-1, -1)).shape
    groups = groups_of(group, quantization, 8 * words)
    width = require(group, "qzeros", dtypes=WORDS, shape=(outputs, -1)).shape[1]
    require(group, "scales", dtypes=FLOATS, shape=(outputs, 8 * width))
    require_room(group, "scales", room=8 * width, groups=groups)
    return outputs, 8 * words


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
    """float32 [R, I]: (code - zero) * scale, exact; AutoAWQ's kernel rounds the same products to float16."""
    _, inputs = dense_shape(group, quantization)
    groups = groups_of(group, quantization, inputs)
    scales = require_finite(group, "scales", group.tensors["scales"][rows, :groups].float())
    zeros = unpack(group.tensors["qzeros"][rows], 4)[:, :groups].float()
    words = group.tensors["qweight"][rows].contiguous()
    out = torch.empty(len(words), inputs, dtype=torch.float32, device=words.device)
    unpack_floats(words, 4, out)
    out.view(len(words), groups, -1).sub_(zeros[:, :, None]).mul_(scales[:, :, None])
    return out


def require_room(group: TensorGroup, name: str, *, room: int, groups: int) -> None:
    """Raise CheckpointError where `name`, padded, holds fewer values for each output than there are groups."""
    if room < groups:
        raise CheckpointError(
            f"{group.module}: {name} holds {room} groups, expected {groups} or more from config.json's group_size; "
            "fix group_size or download the checkpoint again"
        )
