"""Packed modules that tests build by hand, and packers that are the inverse of the readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.formats import Reader
from pipeline.formats.rounded import Rounded
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup


def packed(tensors: Mapping[str, Tensor], module: str = "layer") -> TensorGroup:
    return TensorGroup(module=module, dense_name=f"{module}.weight", tensors=dict(tensors), packed=True)


def quantized(method: str, **raw: Any) -> Quantization:
    return Quantization.parse({"quant_method": method, **raw})


def words(codes: Sequence[int], bits: int) -> list[int]:
    """The signed 32-bit words of a little-endian bit stream, by one big integer: nothing shared with the reader."""
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    raw = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in raw]


def pack_last(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, C] → int32 [R, ceil(C * bits / 32)]."""
    return torch.tensor([words(row, bits) for row in codes.tolist()], dtype=torch.int32)


def by_rows(reader: Reader, group: TensorGroup, quantization: Quantization, *, step: int) -> Tensor:
    """The whole weight, asked for `step` rows at a time."""
    count = reader.dense_shape(group, quantization)[0]
    parts = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    return torch.cat([reader.dequantize(group, quantization, rows) for rows in parts])


def check_same(one: Rounded, other: Rounded) -> None:
    """The same codes on the same grid, in the same dtypes."""
    assert one.bits == other.bits
    for part in ("codes", "scales", "zeros", "groups"):
        found, expected = getattr(one, part), getattr(other, part)
        assert found.dtype == expected.dtype, part
        assert torch.equal(found, expected), part
