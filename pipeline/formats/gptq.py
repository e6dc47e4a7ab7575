"""GPTQ: v1 and v2, 2, 3, 4 or 8 bits, any group size, with and without desc_act, symmetric or not.

On disk (gptqmodel, nn_modules/qlinear/__init__.py `pack_block`, `dequantize_weight`; AutoGPTQ wrote the same), I in and
O out features, b bits, G = ceil(I / group size) groups, or 1 for group size -1:

- `qweight`: int32 [ceil(I * b / 32), O]; down each column, the codes of one output as one bit stream (`words.unpack`).
- `qzeros`: int32 [G, ceil(O * b / 32)]; along each row, the zero points of one group as one bit stream.
- `scales`: float16 [G, O].
- `g_idx`: int32 [I], the group of each input; i // group size unless desc_act ordered them otherwise.

W = (code - zero) * scale. `checkpoint_format` gptq (v1, or absent) stores zeros minus one, gptq_v2 stores them as
they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, MissingTensor, UnsupportedFormat
from pipeline.formats.components import ALL, FLOATS, WORDS, Grid, grid_of, require, require_finite
from pipeline.formats.rounded import Rounded
from pipeline.formats.words import WORD, unpack_floats
from pipeline.formats.words import pack as pack_words
from pipeline.formats.words import unpack as unpack_words
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

BITS = (2, 3, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    grid: Grid
    inputs: int
    outputs: int
    groups: int


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:
    """[O, I], from the shapes of qweight and g_idx, checked against those of qzeros and scales, and g_idx's range."""
    layout = _layout(group, quantization)
    _order(group, layout)
    return layout.outputs, layout.inputs


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
    """float32 [R, I]: (code - zero) * scale, exact; gptqmodel rounds the same products to the scales' dtype."""
    layout = _layout(group, quantization)
    inputs, bits = layout.inputs, layout.grid.bits
    first, last, _ = rows.indices(layout.outputs)
    scales, zeros = _scales_and_zeros(group, quantization, bits, slice(first, last))
    order = _order(group, layout)
    qweight = group.tensors["qweight"][:, first:last].T.contiguous()
    if inputs * bits % WORD:
        out = unpack_words(qweight, bits)[:, :inputs].float()
    else:
        out = torch.empty(last - first, inputs, dtype=torch.float32, device=qweight.device)
        unpack_floats(qweight, bits, out)
    if order is None:
        out.view(-1, layout.groups, inputs // layout.groups).sub_(zeros[:, :, None]).mul_(scales[:, :, None])
        return out
    # index_select is six times as fast as zeros[:, order]
    return out.sub_(torch.index_select(zeros, 1, order)).mul_(torch.index_select(scales, 1, order))


def pack(rounded: Rounded) -> dict[str, Tensor]:
    """`rounded` as the four tensors of the v1 layout, each contiguous; `dequantize` gives its `dense()` back."""
    bits, zeros = rounded.bits, rounded.zeros.T
    if WORD % bits:
        zeros = (zeros - 1).bitwise_and_((1 << bits) - 1)  # see `_zeros`, which undoes it
    qzeros = pack_words(zeros, bits)
    if WORD % bits == 0:
        qzeros = (qzeros.long() - _ones(bits)).to(torch.int32)
    return {
        "qweight": pack_words(rounded.codes, bits).T.contiguous(),
        "qzeros": qzeros,
        "scales": rounded.scales.T.contiguous(),
        "g_idx": rounded.groups.to(torch.int32),
    }


def unpack(group: TensorGroup, quantization: Quantization) -> Rounded:
    """The codes of a module on their grid, whose scales are float16: what `pack` packed, of v1 or v2."""
    layout = _layout(group, quantization)
    require(group, "scales", dtypes=(torch.float16,))
    scales, zeros = _scales_and_zeros(group, quantization, layout.grid.bits, slice(layout.outputs))
    order = _order(group, layout)
    qweight = group.tensors["qweight"].T.contiguous()
    if order is None:
        order = torch.arange(layout.inputs, device=qweight.device) // (layout.inputs // layout.groups)
    return Rounded(
        bits=layout.grid.bits,
        codes=unpack_words(qweight, layout.grid.bits)[:, : layout.inputs].to(torch.uint8),
        scales=scales.half(),
        zeros=zeros.to(torch.uint8),
        groups=order.to(torch.int32),
    )


def _layout(group: TensorGroup, quantization: Quantization) -> _Layout:
    _checkpoint_format(quantization)
    grid = grid_of(group, quantization, bits=BITS)
    rows, outputs = require(group, "qweight", dtypes=WORDS, shape=(-1, -1)).shape
    if "g_idx" in group.tensors:
        (inputs,) = require(group, "g_idx", dtypes=(torch.int32, torch.int64), shape=(-1,)).shape
    elif grid.ordered:
        raise MissingTensor(
            f"{group.module}: desc_act is on, but g_idx is in no shard; the checkpoint is incomplete, download it again"
        )
    else:
        inputs = rows * WORD // grid.bits
    if grid.bits == 3 and (inputs % WORD or outputs % WORD):  # noqa: PLR2004 - three bits, as the text says
        raise UnsupportedFormat(
            f"{group.module}: 3 bits pack 32 codes at a time, which does not divide its {outputs} x {inputs} weights; "
            "this layout cannot be read"
        )
    if rows != _words(inputs, grid.bits) or not inputs:
        raise CheckpointError(
            f"{group.module}: qweight has {rows} rows, expected {_words(inputs, grid.bits)} for {inputs} inputs of "
            f"{grid.bits} bits; fix bits in config.json or download the checkpoint again"
        )
    groups = grid.groups(inputs)
    require(group, "qzeros", dtypes=WORDS, shape=(groups, _words(outputs, grid.bits)))
    require(group, "scales", dtypes=FLOATS, shape=(groups, outputs))
    return _Layout(grid=grid, inputs=inputs, outputs=outputs, groups=groups)


def _scales_and_zeros(group: TensorGroup, quantization: Quantization, bits: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Both of `rows`, from a multiple of a word's outputs on, as float32 [R, G]."""
    scales = require_finite(group, "scales", group.tensors["scales"][:, rows].float()).T.contiguous()
    words = slice(_words(rows.start or 0, bits), _words(rows.stop, bits))
    v1 = _checkpoint_format(quantization) == "gptq"
    return scales, _zeros(group.tensors["qzeros"][:, words], bits, first=v1)[: len(scales)]


def _zeros(qzeros: Tensor, bits: int, *, first: bool) -> Tensor:
    """The zero points as float32 [O or a few more, G]; `first` says that they are v1's."""
    if first and WORD % bits == 0:
        # v1's writers subtract one from every field of a word at once: a zero point of 0 borrows from its neighbour.
        # Adding word-wide gives the borrow back; adding field by field would leave the neighbour one short.
        qzeros = (qzeros.long() + _ones(bits)).to(torch.int32)
    zeros = unpack_words(qzeros, bits)
    if first and WORD % bits:
        zeros = (zeros + 1) & ((1 << bits) - 1)  # 3 bits are subtracted field by field, since fields straddle words
    return zeros.float().T.contiguous()


def _ones(bits: int) -> int:
    """A one in every field of a word."""
    return sum(1 << shift for shift in range(0, WORD, bits))


def _order(group: TensorGroup, layout: _Layout) -> Tensor | None:
    """The group of each input as int64 [I], or None where the groups lie one after another, all full."""
    size = layout.inputs if layout.grid.group_size == -1 else min(layout.grid.group_size, layout.inputs)
    default = torch.arange(layout.inputs) // size
    order = group.tensors["g_idx"].long() if "g_idx" in group.tensors else default
    low, high = (int(n) for n in torch.aminmax(order))
    if low < 0 or high >= layout.groups:
        raise CheckpointError(
            f"{group.module}: g_idx names groups {low} to {high}, but there are {layout.groups}; "
            "download the checkpoint again"
        )
    full = layout.inputs % layout.groups == 0 and layout.inputs // layout.groups == size
    return None if full and torch.equal(order.cpu(), default) else order


def _words(count: int, bits: int) -> int:
    return -(-count * bits // WORD)


def _checkpoint_format(quantization: Quantization) -> str:
    """`gptq` or `gptq_v2`; raise UnsupportedFormat for the layouts of single kernels."""
    raw = quantization.raw
    found = str(raw.get("checkpoint_format") or raw.get("format") or "gptq").lower()
    if found not in {"gptq", "gptq_v2"}:
        raise UnsupportedFormat(
            f"gptq with checkpoint_format {found} cannot be read, only gptq and gptq_v2; save it again with gptqmodel "
            "in one of these"
        )
    if str(raw.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        raise UnsupportedFormat(
            f"gptq packed in {raw['pack_dtype']} cannot be read, only int32; save it again in int32"
        )
    return found
