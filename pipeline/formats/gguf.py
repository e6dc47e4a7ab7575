"""GGUF: every ggml type that the gguf package or transformers can dequantize.

On disk (ggml's ggml-common.h): a row of I weights is I / B blocks of S bytes one after another, each with its own
scales, where B and S are the type's (`pipeline.gguf_headers.BLOCKS`): no row depends on another. A packed group has one
component called by its type, such as `Q4_K`, uint8 [..., I / B * S]; or several, `gate.Q4_K` and `up.Q6_K`, which are
joined along dimension 1: the experts' two halves that transformers keeps in one tensor.

The blocks are read by transformers' torch functions (integrations/gguf/dequant.py) where it has them, which a core
does at 1 to 6 ns a weight for the common types, else by gguf's own in numpy (gguf/quants.py), at 4 to 13 ns. Both give
the same values.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as dequantize_numpy
from gguf.quants import quantize as quantize_numpy
from torch import Tensor
from transformers.integrations.gguf.dequant import GGML_BLOCK
from transformers.integrations.gguf.dequant import dequantize as dequantize_torch

from pipeline.errors import CheckpointError, UnsupportedFormat
from pipeline.formats.components import ALL
from pipeline.gguf_headers import BLOCKS
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

CHUNK = 1 << 18  # weights dequantized at a time: what is between the bytes and the floats stays in the core's cache


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:  # noqa: ARG001 - the protocol's
    """The whole weight's shape, from the bytes in a row; raise UnsupportedFormat for a type that cannot be read."""
    shapes = [_shape(group, part, tensor) for part, tensor in group.tensors.items()]
    first = shapes[0]
    if len(shapes) == 1:
        return first
    if any(len(shape) != 3 or shape[::2] != first[::2] for shape in shapes):  # noqa: PLR2004 - experts stack to three dimensions
        raise CheckpointError(
            f"{group.dense_name}: is made of tensors of shapes {', '.join(str(list(shape)) for shape in shapes)}, "
            "which cannot be joined; download the checkpoint again"
        )
    return first[0], sum(shape[1] for shape in shapes), first[2]


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
    """float32 [R, ...]: `rows` of the first dimension; exact, as ggml's own float32 reference functions."""
    shape = dense_shape(group, quantization)
    parts = {part: tensor[rows] if tensor.ndim > 1 else tensor for part, tensor in group.tensors.items()}
    first = next(iter(parts.values()))
    if len(shape) == 1:
        out = torch.empty(shape, dtype=torch.float32, device=first.device)
        _fill(_type(next(iter(parts))), first, out)
        return out[rows]
    out = torch.empty(len(first), *shape[1:], dtype=torch.float32, device=first.device)
    if len(parts) == 1:
        _fill(_type(next(iter(parts))), first, out)
        return out
    for i in range(len(first)):
        at = 0
        for part, tensor in parts.items():
            _fill(_type(part), tensor[i], out[i, at : at + tensor.shape[1]])
            at += tensor.shape[1]
    return out


def pack(weight: Tensor, dtype: str) -> Tensor:
    """uint8 [..., row bytes] of a float32 weight [..., I] in a quantized ggml type, as the gguf package rounds it.

    That is to nearest, each block by itself, the same bytes as ggml's reference functions for Q8_0 and Q4_0
    (ggml-quants.c, `quantize_row_q8_0_ref`, `quantize_row_q4_0_ref`).
    """
    count, size = BLOCKS[dtype]
    flat = weight.contiguous().reshape(-1)
    out = torch.empty(len(flat) // count * size, dtype=torch.uint8)
    for start in range(0, len(flat), CHUNK):  # as one row: gguf goes through rows sixteen at a time, in Python
        part = flat[start : start + CHUNK].numpy().reshape(1, -1)
        packed = torch.from_numpy(quantize_numpy(part, GGMLQuantizationType[dtype]))
        out[start // count * size :][: packed.numel()] = packed.view(-1)
    return out.reshape(*weight.shape[:-1], weight.shape[-1] // count * size)


def _fill(dtype: str, tensor: Tensor, out: Tensor) -> None:
    """Put the values of `tensor` into `out`, float32 and contiguous."""
    weights, size = BLOCKS[dtype]
    if weights == 1:
        out.copy_(tensor)
        return
    blocks, flat, step = tensor.reshape(-1, size), out.view(-1, weights), CHUNK // weights
    for start in range(0, len(blocks), step):
        flat[start : start + step] = _values(dtype, blocks[start : start + step]).view(-1, weights)


def _values(dtype: str, blocks: Tensor) -> Tensor:
    kind = GGMLQuantizationType[dtype]
    if int(kind) in GGML_BLOCK:
        values: Tensor = dequantize_torch(blocks.reshape(-1), int(kind))
        return values
    with np.errstate(all="ignore"):  # a scale of NaN or infinity is found by whoever checks the weights
        row = blocks.cpu().numpy().reshape(1, -1)  # gguf goes through rows sixteen at a time, in Python
        return torch.from_numpy(dequantize_numpy(row, kind)).to(blocks.device)


def _shape(group: TensorGroup, part: str, tensor: Tensor) -> tuple[int, ...]:
    dtype = _type(part)
    if dtype not in BLOCKS or not _can_read(dtype):
        raise UnsupportedFormat(
            f"{group.dense_name}: is of ggml type {dtype}, which the gguf package cannot dequantize; take a file of "
            "another type"
        )
    weights, size = BLOCKS[dtype]
    if weights == 1:
        return tuple(tensor.shape)
    if tensor.dtype != torch.uint8 or not tensor.ndim or tensor.shape[-1] % size:
        raise CheckpointError(
            f"{group.dense_name}: has {list(tensor.shape)} {tensor.dtype}, expected rows of bytes in blocks of {size} "
            f"for {dtype}; download the checkpoint again"
        )
    return (*tensor.shape[:-1], tensor.shape[-1] // size * weights)


def _type(part: str) -> str:
    return part.rpartition(".")[2]


@cache
def _can_read(dtype: str) -> bool:
    """Whether a block of zeros can be dequantized; the tables of both libraries are their own."""
    weights, size = BLOCKS[dtype]
    if weights == 1:
        return True
    try:
        _values(dtype, torch.zeros(1, size, dtype=torch.uint8))
    except NotImplementedError:
        return False
    return True
