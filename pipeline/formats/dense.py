"""Dense tensors: bf16, fp16 or fp32, as safetensors stores them."""

from __future__ import annotations

from torch import Tensor

from pipeline.formats.components import ALL
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup


def dense_shape(group: TensorGroup, quantization: Quantization | None = None) -> tuple[int, ...]:  # noqa: ARG001 - the protocol's
    """The tensor's own shape."""
    return tuple(_only(group).shape)


def dequantize(group: TensorGroup, quantization: Quantization | None = None, rows: slice = ALL) -> Tensor:  # noqa: ARG001 - the protocol's
    """The tensor as it is stored, dtype included: dense tensors may be integers (a buffer), and need no second copy."""
    tensor = _only(group)
    return tensor if rows == ALL else tensor[rows]


def _only(group: TensorGroup) -> Tensor:
    (tensor,) = group.tensors.values()
    return tensor
