"""bitsandbytes int8 (LLM.int8), row-major.

On disk (bitsandbytes, nn/modules.py `Linear8bitLt._save_to_state_dict`): `weight` int8 [O, I]; `SCB` float32 [O], the
largest magnitude of each row; `weight_format` uint8 scalar, 0 for row-major, the only order that
bitsandbytes still writes and loads.
W = weight * SCB / 127 (functional.py `int8_vectorwise_dequant`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.checkpoint import Quantization
from pipeline.errors import UnsupportedFormat
from pipeline.formats.components import ALL, FLOATS, require, require_finite
from pipeline.shards import TensorGroup


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:  # noqa: ARG001 - the protocol's
    """The codes' own shape; raise UnsupportedFormat for tiles of another order."""
    if "weight_format" in group.tensors:
        order = int(require(group, "weight_format", dtypes=(torch.uint8,), shape=()))
        if order != 0:
            raise UnsupportedFormat(
                f"{group.module}: weight_format is {order}, only 0 (row-major) can be read; save it again with a newer "
                "bitsandbytes"
            )
    return tuple(require(group, "weight", dtypes=(torch.int8,), shape=(-1, -1)).shape)


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
    """float32 [R, I]: code * SCB of its row * (1 / 127), rounded in this order as bitsandbytes does."""
    shape = dense_shape(group, quantization)
    scales = require(group, "SCB", dtypes=FLOATS, shape=shape[:1])[rows].float()
    require_finite(group, "SCB", scales)
    return group.tensors["weight"][rows].float().mul_(scales[:, None]).mul_(1 / 127)
