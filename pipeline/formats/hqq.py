"""HQQ: 8, 4, 3, 2 or 1 bits, grouped along either axis.

On disk (hqq 0.2.8, core/quantize.py `HQQLinear.state_dict`, core/bitpack.py; transformers saves the same), O x I
weights in row-major order, G = O * I / group size groups. `axis` 1 lays the weights as a table of G rows, a group
each, `axis` 0 as one of G columns, a group each.

- `W_q`: that table's codes, cut into P equal runs of rows that share the words of uint8, or of int32 for 3 bits; the
  first run has the highest bits of a word. P = 8 / bits, or 10 for 3 bits, where the last run is padded. With
  `view_as_float` the same bytes under a float dtype.
- `scale`, `zero`: float [G, 1] for axis 1, [1, G] for axis 0.
- scalars and texts, as tensors: `shape` int64 [2], `group_size` and `axis` int32, `packing` uint8 text such as 4bit_u8,
  `view_as_float`, `quant_scale` and `quant_zero` uint8, and others that loading does not need.

W = (code - zero) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, UnsupportedFormat
from pipeline.formats.components import ALL, FLOATS, require, require_finite
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

PACKINGS = {  # bits, codes in a word, dtype of a word
    "8bit_u8": (8, 1, torch.uint8),
    "4bit_u8": (4, 2, torch.uint8),
    "3bit_32": (3, 10, torch.int32),
    "2bit_u8": (2, 4, torch.uint8),
    "1bit_u8": (1, 8, torch.uint8),
}
INTEGERS = (torch.uint8, torch.int32, torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    outputs: int
    inputs: int
    group_size: int
    groups: int
    axis: int
    bits: int
    runs: int
    words: Tensor  # one dimension
    scales: Tensor
    zeros: Tensor


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:  # noqa: ARG001 - the module says all
    """[O, I], from the module's own `shape`, checked against W_q, scale and zero."""
    layout = _layout(group)
    return layout.outputs, layout.inputs


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:  # noqa: ARG001 - as above
    """float32 [R, I]: (code - zero) * scale, exact; hqq rounds both steps to its compute_dtype."""
    layout = _layout(group)
    start, stop, _ = rows.indices(layout.outputs)
    first, last = start * layout.inputs, stop * layout.inputs
    if layout.axis == 0:
        out = _codes(layout, first, last)
        require_finite(group, "scale", layout.scales)
        require_finite(group, "zero", layout.zeros)
        _by_column(out, layout.zeros.float().flatten(), layout.scales.float().flatten(), offset=first % layout.groups)
        return out.view(-1, layout.inputs)
    size = layout.group_size
    groups = slice(first // size, -(-last // size))  # a group may begin in the row above and end in the one below
    scales = require_finite(group, "scale", layout.scales[groups].float())
    zeros = require_finite(group, "zero", layout.zeros[groups].float())
    out = _codes(layout, groups.start * size, groups.stop * size)
    out.view(-1, size).sub_(zeros).mul_(scales)
    before = first - groups.start * size
    return out[before : before + last - first].view(-1, layout.inputs)


def _codes(layout: _Layout, first: int, last: int) -> Tensor:
    """Codes `first` to `last` of all, as float32."""
    words, length = layout.words, layout.words.numel()
    out = torch.empty(last - first, dtype=torch.float32, device=words.device)
    for run in range(first // length, -(-last // length)):
        start, stop = max(first, run * length), min(last, (run + 1) * length)
        codes = words[start - run * length : stop - run * length]
        if layout.runs > 1:
            codes = (codes >> (layout.runs - 1 - run) * layout.bits).bitwise_and_((1 << layout.bits) - 1)
        out[start - first : stop - first].copy_(codes)
    return out


def _by_column(values: Tensor, zeros: Tensor, scales: Tensor, *, offset: int) -> None:
    """Subtract and multiply in place what repeats every len(zeros) values, beginning with its element `offset`."""
    count, period = values.numel(), zeros.numel()
    head = min(-offset % period, count)
    whole = head + (count - head) // period * period
    values[:head].sub_(zeros[offset : offset + head]).mul_(scales[offset : offset + head])
    values[head:whole].view(-1, period).sub_(zeros).mul_(scales)
    values[whole:].sub_(zeros[: count - whole]).mul_(scales[: count - whole])


def _layout(group: TensorGroup) -> _Layout:
    outputs, inputs = (int(n) for n in require(group, "shape", dtypes=INTEGERS, shape=(2,)))
    size, axis, packing = _integer(group, "group_size"), _integer(group, "axis"), _packing(group)
    for name in ("quant_scale", "quant_zero"):
        if name in group.tensors and _integer(group, name):
            raise UnsupportedFormat(
                f"{group.module}: hqq with {name} cannot be read; hqq writes no such safetensors, save it again without"
            )
    bits, runs, dtype = PACKINGS[packing]
    if min(outputs, inputs, size) < 1 or outputs * inputs % size or axis not in (0, 1):
        raise CheckpointError(
            f"{group.module}: says shape {[outputs, inputs]}, group_size {size} and axis {axis}, which cannot be; "
            "download the checkpoint again"
        )
    groups = outputs * inputs // size
    words = _words(group, dtype)
    table = (groups, size) if axis == 1 else (size, groups)
    expected = -(-table[0] // runs) * table[1]
    if words.numel() != expected:
        raise CheckpointError(
            f"{group.module}: W_q holds {words.numel()} words, expected {expected} for shape {[outputs, inputs]} in "
            f"{packing}; download the checkpoint again"
        )
    shape = (groups, 1) if axis == 1 else (1, groups)
    return _Layout(
        outputs=outputs, inputs=inputs, group_size=size, groups=groups, axis=axis, bits=bits, runs=runs, words=words,
        scales=require(group, "scale", dtypes=FLOATS, shape=shape),
        zeros=require(group, "zero", dtypes=FLOATS, shape=shape),
    )  # fmt: skip


def _words(group: TensorGroup, dtype: torch.dtype) -> Tensor:
    viewed = "view_as_float" in group.tensors and _integer(group, "view_as_float")
    stored = require(group, "W_q", dtypes=FLOATS if viewed else (dtype,), shape=(-1, -1))
    try:
        return stored.contiguous().flatten().view(dtype)
    except RuntimeError as error:  # an odd number of float16 is no whole number of int32
        raise CheckpointError(
            f"{group.module}: W_q has shape {list(stored.shape)}, which is no whole number of words; "
            "download the checkpoint again"
        ) from error


def _packing(group: TensorGroup) -> str:
    text = bytes(require(group, "packing", dtypes=(torch.uint8,), shape=(-1,)).tolist()).decode(errors="replace")
    if text not in PACKINGS:
        raise UnsupportedFormat(f"{group.module}: hqq packing {text!r} cannot be read, only {', '.join(PACKINGS)}")
    return text


def _integer(group: TensorGroup, name: str) -> int:
    return int(require(group, name, dtypes=INTEGERS, shape=()))
