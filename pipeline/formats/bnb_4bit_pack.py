"""bitsandbytes NF4 and FP4, written bit for bit as bitsandbytes 0.50 does on a CPU; `bnb_4bit` reads them.

A weight becomes the code whose value lies nearest to weight / absmax of its block, computed in float32: above how many
of the 15 midpoints between neighbouring values it lies (backends/default/ops.py `quantize_4bit`). Counted one by one,
or searched, those midpoints cost most of the time. Here the high half of the quotient's bits picks a cell that holds at
most one midpoint, and one addition carries where the low half lies beyond it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import NonFinite
from pipeline.formats.bnb_4bit import STATE
from pipeline.formats.bnb_dynamic import NESTED, dynamic_map, nest
from pipeline.formats.components import NOT_FINITE, all_finite
from pipeline.formats.shares import TILE, share_out

BLOCK = 64
_SMALLEST = 1e-38  # bitsandbytes divides by no less: a block of zeros gives zeros
_HALF = 1 << 16  # bits of a float come in a high and a low half
_NEGATIVE = 16  # cell codes of quotients below zero count from here, downwards from the middle code
_FIELDS = 0x1F << 48 | 0x1F << 16  # where the cell codes of a pair lie in 64 bits

Kind = Literal["nf4", "fp4"]
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

# What each code stands for (functional.py `get_4bit_type`): float32 when stored.
_VALUES: Mapping[Kind, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12,
        0.0, -0.0625 / 12, -8 / 12, -1.0, -4 / 12, -6 / 12, -2 / 12, -3 / 12,
    ),
}  # fmt: skip
# The codes from the least value to the largest. FP4 has two zeros: which one stands first is bitsandbytes' own sorting.
_ASCENDING: Mapping[Kind, tuple[int, ...]] = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}


def pack(weight: Tensor, *, kind: Kind, double_quant: bool) -> dict[str, Tensor]:
    """The components of `weight` [O, I] in bfloat16, float16 or float32, in blocks of 64; sorted by name.

    The mean that double quantization takes off depends in its last bit on torch's number of threads, as bitsandbytes'
    does. Raise NonFinite, without the tensor's name, where a weight is NaN or infinite.
    """
    flat = weight.reshape(-1)
    scales = torch.empty(-(-flat.numel() // BLOCK), device=flat.device)
    codes = torch.empty(-(-flat.numel() // 2), 1, dtype=torch.uint8, device=flat.device)
    _quantize_all(_Task(flat=flat, scales=scales, codes=codes.view(-1), tables=_tables(kind, flat.device)))
    return dict(sorted(({"weight": codes} | _described(weight, scales, kind, double_quant=double_quant)).items()))


def shapes(weight: Tensor, *, kind: Kind, double_quant: bool) -> Shapes:
    """Component → its dtype and shape, as `pack` will give them.

    Double quantization reads all of `weight` for it: a mean is kept as text, whose length is not known before. Else
    only its dtype and shape count. Raise NonFinite as `pack` does.
    """
    count = weight.numel()
    device = weight.device if double_quant else torch.device("cpu")
    scales = torch.zeros(-(-count // BLOCK), device=device)
    if double_quant:
        _quantize_all(_Task(flat=weight.reshape(-1), scales=scales, codes=None, tables=None))
    found = _described(weight, scales, kind, double_quant=double_quant)
    known = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()}
    return dict(sorted((known | {"weight": (torch.uint8, (-(-count // 2), 1))}).items()))


def _described(weight: Tensor, scales: Tensor, kind: Kind, *, double_quant: bool) -> dict[str, Tensor]:
    """All components but the codes (functional.py `quantize_4bit`, `QuantState.as_dict`)."""
    # In tiles too: the mean alone is left to torch's threads, whose number decides its last bit in bitsandbytes.
    if not all(all_finite(part) for part in torch.split(scales, TILE)):
        raise NonFinite(NOT_FINITE)
    state: dict[str, Any] = {
        "quant_type": kind,
        "blocksize": BLOCK,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": tuple(weight.shape),
    }
    components = {"weight.absmax": scales, "weight.quant_map": torch.tensor(_VALUES[kind], device=scales.device)}
    if double_quant:
        offset = scales.mean()
        codes, outer = nest(scales, offset)
        components |= {
            "weight.absmax": codes,
            "weight.nested_absmax": outer,
            "weight.nested_quant_map": dynamic_map().to(scales.device),
        }
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset.item()}
    text = json.dumps(state).encode()
    components[STATE + kind] = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(scales.device)
    return components


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    """`cells`: int32 [65536], added to a quotient's bits. `bytes`: uint8 [1024], what two cell codes are stored as."""

    cells: Tensor
    bytes: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """A flat weight, and where its scales and codes go; without `codes` the scales alone are wanted."""

    flat: Tensor
    scales: Tensor
    codes: Tensor | None
    tables: _Tables | None


def _quantize_all(task: _Task) -> None:
    """Whole blocks on every core, what is left over after them."""
    whole = task.flat.numel() // BLOCK * BLOCK
    share_out(lambda start, stop: _quantize(task, start, stop), count=whole, step=TILE)
    if whole < task.flat.numel():
        _quantize_rest(task, whole)


def _quantize(task: _Task, start: int, stop: int) -> None:
    """Whole blocks, a tile at a time, in the same few buffers."""
    buffers = _Buffers.of(min(TILE, stop - start), task.flat.device)
    for first in range(start, stop, TILE):
        last = min(first + TILE, stop)
        values = buffers.values[: last - first].copy_(task.flat[first:last])
        blocks, scales = values.view(-1, BLOCK), task.scales[first // BLOCK : last // BLOCK]
        # The quotients' place is free yet; the cores' fastest maximum is that of floats that lie together.
        magnitudes = torch.abs(values, out=buffers.cells.view(torch.float32)[: last - first])
        torch.amax(magnitudes.view(-1, BLOCK), 1, out=scales)
        if task.codes is not None and task.tables is not None:
            blocks.mul_((1.0 / scales.clamp(min=_SMALLEST))[:, None])
            _store(values, task.tables, task.codes[first // 2 : last // 2], buffers)


def _quantize_rest(task: _Task, whole: int) -> None:
    """The last block where it is a short one: bitsandbytes divides there, and keeps the smallest divisor."""
    values = task.flat[whole:].float()
    scale = values.abs().amax().clamp(min=_SMALLEST)
    task.scales[-1] = scale
    if task.codes is not None and task.tables is not None:
        values = torch.nn.functional.pad(values / scale, (0, values.numel() % 2))
        _store(values, task.tables, task.codes[whole // 2 :], _Buffers.of(values.numel(), values.device))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Buffers:
    """Memory for one tile: made once, since fresh pages cost more than the arithmetic that fills them."""

    values: Tensor
    cells: Tensor
    sums: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, count: int, device: torch.device) -> _Buffers:
        """For tiles of `count` weights."""
        return cls(
            values=torch.empty(count, device=device),
            cells=torch.empty(count, dtype=torch.int32, device=device),
            sums=torch.empty(count, dtype=torch.int32, device=device),
            pairs=torch.empty(count // 2, dtype=torch.int64, device=device),
        )


def _store(values: Tensor, tables: _Tables, out: Tensor, buffers: _Buffers) -> None:
    """Write the codes of `values`, float32 [2 N] between -1 and 1, into `out`, uint8 [N]."""
    bits, count = values.view(torch.int32), values.numel()
    cells = torch.bitwise_right_shift(bits, 16, out=buffers.cells[:count]).bitwise_and_(_HALF - 1)
    sums = torch.index_select(tables.cells, 0, cells, out=buffers.sums[:count]).add_(bits)
    pairs = torch.bitwise_and(sums.view(torch.int64), _FIELDS, out=buffers.pairs[: count // 2])
    # Both codes meet in bits 48 .. 57: the first of them moves up by 37.
    pairs.mul_(1 << 37 | 1).bitwise_right_shift_(48)
    torch.index_select(tables.bytes, 0, pairs, out=out)


@cache
def _tables(kind: Kind, device: torch.device) -> _Tables:
    ascending = torch.tensor(_ASCENDING[kind])
    values = torch.tensor(_VALUES[kind])[ascending]
    bounds = (values[:-1] + values[1:]) / 2
    every = torch.arange(32)
    codes = ascending[torch.where(every < _NEGATIVE, every, _NEGATIVE + 7 - every).clamp(0, 15)]
    pairs = codes[:, None] << 4 | codes
    return _Tables(cells=_cells(bounds).to(device), bytes=pairs.flatten().to(torch.uint8).to(device))


def _cells(bounds: Tensor) -> Tensor:
    """What to add to the bits of a quotient in each cell, so that its cell code comes to lie in bits 16 .. 20.

    A quotient's code is how many of `bounds`, float32 [15] ascending, lie below it. Among positive floats it grows with
    the bits, among negative ones it falls: there the cell code is 16 + 7 - code, which grows too.
    """
    cells = torch.arange(_HALF)
    low, high = (_floats(cells << 16 | half) for half in (0, _HALF - 1))
    negative = cells >= _HALF // 2
    codes = [torch.bucketize(end, bounds) for end in (low, high)]
    first, last = (torch.where(negative, _NEGATIVE + 7 - code, code) for code in codes)
    carry = torch.zeros_like(cells)
    for bound in bounds.view(torch.int32).tolist():
        cell, half = bound >> 16 & (_HALF - 1), bound & (_HALF - 1)
        if first[cell] != last[cell]:
            # A positive quotient has the next code above the bound, a negative one on it or below.
            carry[cell] = _HALF - (half if negative[cell] else half + 1)
    return _signed((first << 16) + carry - (cells << 16))


def _floats(bits: Tensor) -> Tensor:
    return _signed(bits).view(torch.float32)


def _signed(words: Tensor) -> Tensor:
    """The low 32 bits of int64 `words`, as int32."""
    low = words & 0xFFFFFFFF
    return (low - (low >> 31 << 32)).to(torch.int32)
