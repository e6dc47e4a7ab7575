"""compressed-tensors, as llm-compressor and its like write it.

On disk (compressed-tensors, compressors/*/base.py, quantization/lifecycle/forward_helpers.py), I in and O out features,
b bits; `schemes` tells which module has which of these:

- pack-quantized: `weight_packed` int32 [O, ceil(I * b / 32)], along each row one bit stream of code + 2 ** (b - 1);
  `weight_shape` [2]; asymmetric: `weight_zero_point` int32 [ceil(O * b / 32), G], down each column the same of zero
  points, or int8 of the scales' shape; older act-order: `weight_g_idx` int32 [I], the group of each input.
- int-, float- and naive-quantized: `weight` int8 or float8 [O, I]; asymmetric: `weight_zero_point` as the scales.
- nvfp4-pack-quantized: `weight_packed` uint8 [O, I / 2] of e2m1, the low nibble first; `weight_scale` float8_e4m3fn
  [O, I / 16], to be divided by `weight_global_scale` [1].
- mxfp4- and mxfp6-pack-quantized, mxfp8-quantized: e2m1, e2m3 (4 codes in 3 bytes) or float8; scales uint8, E8M0.
- not compressed: `weight` in floats. quantization_status frozen: the library rounds it to its grid at each forward
  pass, so that is done here; decompressed, or format dense: it is what the model computes with.

`weight_scale` is [O, G], [O, 1], [1], or [ceil(O / h), ceil(I / w)] for blocks. W = (code - zero) * scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, MissingTensor, UnsupportedFormat
from pipeline.formats import tiles
from pipeline.formats.components import ALL, FLOATS, WORDS, require, require_finite
from pipeline.formats.rounded import Rounded
from pipeline.formats.schemes import Scheme, check_model, scheme_of
from pipeline.formats.small_floats import E8M0, FP8, fp4_floats, fp6_floats, fp8_floats, scale_floats
from pipeline.formats.words import WORD, unpack_floats
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

FP6_GROUP = 24  # bytes of 32 codes
WHOLE = (torch.int8, *FP8, *FLOATS)
INTEGERS = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packed:
    """One module's tensors, which fit each other; `block` is the (height, width) of the weight for each scale."""

    scheme: Scheme
    codes: Tensor
    shape: tuple[int, int]
    block: tuple[int, int]
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    divisor: Tensor | None

    @property
    def words(self) -> bool:
        return self.codes.dtype in WORDS

    @property
    def dense(self) -> bool:
        return self.codes.dtype in FLOATS


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:
    """[O, I], from weight_shape or the weight's own, checked against the shapes of all other tensors."""
    return _packed(group, quantization).shape


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
    """float32 [R, I]: (code - zero) * scale, exact; the library rounds the same products to the scales' dtype."""
    packed = _packed(group, quantization)
    first, last, _ = rows.indices(packed.shape[0])
    scales = scale_floats(tiles.rows_of(packed.scales, packed.block[0], first, last))
    if packed.divisor is not None:
        scales = scales / packed.divisor
    require_finite(group, "weight_scale", scales)
    zeros = _zero_rows(packed, first, last)
    if packed.dense:
        return _rounded(packed, quantization, zeros, slice(first, last))
    weight = _codes(packed, first, last)
    if zeros is not None:
        for part, points in _tiles(packed, weight, zeros):
            part.sub_(points)
    elif packed.words:
        weight.sub_(1 << packed.scheme.bits - 1)
    for part, factors in _tiles(packed, weight, scales):
        part.mul_(factors)
    return weight


def unpack(group: TensorGroup, quantization: Quantization) -> Rounded:
    """The codes of a module of symmetric integers on their grid, its groups one after another."""
    packed = _packed(group, quantization)
    half, (outputs, inputs) = 1 << packed.scheme.bits - 1, packed.shape
    codes = _codes(packed, 0, outputs).add_(0 if packed.words else half)
    return Rounded(
        bits=packed.scheme.bits, codes=codes.to(torch.uint8), scales=packed.scales,
        zeros=torch.full_like(packed.scales, half, dtype=torch.uint8),
        groups=torch.arange(inputs, dtype=torch.int32, device=codes.device) // packed.block[1],
    )  # fmt: skip


def _tiles(packed: _Packed, weight: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    if packed.order is not None:
        return [(weight, rows[:, packed.order])]
    return list(tiles.tiles(weight, rows, packed.block[1]))


def _codes(packed: _Packed, first: int, last: int) -> Tensor:
    """Rows first .. last of the codes as float32 [R, I]; those in words still have 2 ** (b - 1) added."""
    codes, bits = packed.codes[first:last], packed.scheme.bits
    if packed.words:
        return _word_floats(codes, bits, packed.shape[1])
    if codes.dtype == torch.uint8:
        return fp4_floats(codes) if bits == 4 else fp6_floats(codes)  # noqa: PLR2004 - four bits, as the name says
    return fp8_floats(codes) if codes.dtype in FP8 else codes.float()


def _word_floats(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row of `words` int32 [R, W] as float32 [R, count], contiguous."""
    if WORD % bits:  # a row ends where its last word does, not where the pattern of straddling codes begins anew
        words = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    out = torch.empty(len(words), words.shape[1] * WORD // bits, dtype=torch.float32, device=words.device)
    unpack_floats(words, bits, out)
    return out[:, :count].contiguous()


def _zero_rows(packed: _Packed, first: int, last: int) -> Tensor | None:
    """Zero points of the rows first .. last as float32 [R or 1, G], offset as the codes of words are."""
    zeros, bits = packed.zeros, packed.scheme.bits
    if zeros is None:
        return None
    if zeros.dtype in WORDS:  # a bit stream down each column; the rows' first bit begins a word
        words = zeros[first * bits // WORD : -(-last * bits // WORD)].T.contiguous()
        return _word_floats(words, bits, last - first).T.contiguous()
    rows = tiles.rows_of(zeros, packed.block[0], first, last).float()
    return rows + (1 << bits - 1) if packed.words else rows


def _rounded(packed: _Packed, quantization: Quantization, zeros: Tensor | None, rows: slice) -> Tensor:
    """`rows` of a weight in floats, on its grid if the library would round it there at each forward pass.

    Every step is in the dtype that the library takes it in, so that the same codes come out.
    """
    if quantization.raw.get("quantization_status") != "frozen":
        return packed.codes[rows].float()
    scales = tiles.rows_of(packed.scales, packed.block[0], rows.start, rows.stop)
    weight = packed.codes[rows].to(torch.promote_types(packed.codes.dtype, scales.dtype), copy=True)
    for part, factors in _tiles(packed, weight, scales):
        part.div_(factors)
    if zeros is not None:
        for part, points in _tiles(packed, weight, zeros):
            part.add_(points.to(part.dtype))
    if packed.scheme.kind == "int":
        half = 1 << packed.scheme.bits - 1
        weight.clamp_(-half, half - 1).round_()
    else:
        top = torch.finfo(torch.float8_e4m3fn).max
        weight = weight.clamp_(-top, top).to(torch.float8_e4m3fn)
    weight = weight.to(scales.dtype)
    if zeros is not None:
        for part, points in _tiles(packed, weight, zeros):
            part.sub_(points.to(part.dtype))
    for part, factors in _tiles(packed, weight, scales):
        part.mul_(factors)
    return weight.float()


def _packed(group: TensorGroup, quantization: Quantization) -> _Packed:
    """The module's tensors; raise an InputError unless their dtypes and shapes fit each other and the scheme."""
    check_model(quantization)
    scheme = scheme_of(group.module, quantization)
    if "weight_packed" in group.tensors:
        codes, shape = _packed_codes(group, scheme)
    else:
        codes = _whole_codes(group, scheme, quantization)
        shape = (codes.shape[0], codes.shape[1])
    outputs, inputs = shape
    if not outputs or not inputs:
        raise CheckpointError(f"{group.module}: weight has shape {list(shape)}, which is empty; {_AGAIN}")
    height, width = scheme.tile(*shape)
    if scheme.strategy in {"group", "tensor_group"} and inputs % width:
        raise UnsupportedFormat(
            f"{group.module}: group size {width} does not divide its {inputs} inputs; fix group_size in config.json"
        )
    grid = (-(-outputs // height), -(-inputs // width))
    return _Packed(
        scheme=scheme, codes=codes, shape=shape, block=(height, width),
        scales=_grid(group, "weight_scale", _scale_dtypes(codes), grid),
        zeros=_zeros(group, scheme, codes, grid),
        order=_order(group, inputs, grid[1]) if scheme.strategy == "group" else None,
        divisor=_divisor(group, scheme) if codes.dtype == torch.uint8 else None,
    )  # fmt: skip


def _packed_codes(group: TensorGroup, scheme: Scheme) -> tuple[Tensor, tuple[int, int]]:
    if scheme.kind == "float":
        codes = require(group, "weight_packed", dtypes=(torch.uint8,), shape=(-1, -1))
        rows, count = codes.shape
        if scheme.bits == 4:  # noqa: PLR2004 - two in a byte
            return codes, (rows, 2 * count)
        if scheme.bits == 8 or count % FP6_GROUP:  # noqa: PLR2004 - a byte each are not packed
            raise CheckpointError(
                f"{group.module}: weight_packed has {count} bytes in a row, which {scheme.bits}-bit floats cannot fill "
                f"in groups of 32; fix num_bits in config.json or {_AGAIN}"
            )
        return codes, (rows, count // 3 * 4)
    codes = require(group, "weight_packed", dtypes=WORDS, shape=(-1, -1))
    rows, count = codes.shape
    if "weight_shape" in group.tensors:
        outputs, inputs = require(group, "weight_shape", dtypes=INTEGERS, shape=(2,)).tolist()
    elif WORD % scheme.bits:
        raise MissingTensor(
            f"{group.module}: weight_shape is in no shard; the checkpoint is incomplete, download it again"
        )
    else:
        outputs, inputs = rows, count * WORD // scheme.bits
    if (rows, count) != (outputs, -(-inputs * scheme.bits // WORD)):
        raise CheckpointError(
            f"{group.module}: weight_packed has shape {[rows, count]}, which is not {scheme.bits} bits for each weight "
            f"of {[outputs, inputs]}; fix num_bits in config.json or {_AGAIN}"
        )
    return codes, (outputs, inputs)


def _whole_codes(group: TensorGroup, scheme: Scheme, quantization: Quantization) -> Tensor:
    codes = require(group, "weight", dtypes=WHOLE, shape=(-1, -1))
    dtype, raw = str(codes.dtype).removeprefix("torch."), quantization.raw
    status = str(raw.get("quantization_status"))
    if codes.dtype in FLOATS:
        if status not in {"frozen", "decompressed"} and raw.get("format") != "dense":
            raise CheckpointError(
                f"{group.module}: weight is {dtype}, but quantization_status {status} says otherwise; finish "
                "quantizing it with llm-compressor, or fix quantization_status in config.json"
            )
        if status == "frozen" and scheme.kind == "float" and scheme.bits != 8:  # noqa: PLR2004 - a byte each
            raise UnsupportedFormat(
                f"{group.module}: frozen float weights of {scheme.bits} bits cannot be read; compress them with "
                "llm-compressor's save_pretrained first"
            )
    elif (codes.dtype == torch.int8) != (scheme.kind == "int") or (codes.dtype in FP8 and scheme.bits != 8):  # noqa: PLR2004 - eight bits
        raise CheckpointError(
            f"{group.module}: weight is {dtype}, but its scheme says {scheme.kind} of {scheme.bits} bits; fix "
            "config.json"
        )
    return codes


def _scale_dtypes(codes: Tensor) -> tuple[torch.dtype, ...]:
    if codes.dtype == torch.uint8:
        return (*FLOATS, torch.float8_e4m3fn, *E8M0)
    return (*FLOATS, *E8M0) if codes.dtype in FP8 else FLOATS


def _grid(group: TensorGroup, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int]) -> Tensor:
    """The tensor `name` as a grid of `shape`; a scalar or a line of as many values may stand for it."""
    tensor = require(group, name, dtypes=dtypes)
    if tensor.ndim < len(shape) and tensor.numel() == math.prod(shape) and 1 in shape:
        return tensor.reshape(shape)
    return require(group, name, dtypes=dtypes, shape=shape)


def _zeros(group: TensorGroup, scheme: Scheme, codes: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """Zero points as they are stored; symmetric schemes have none, or a grid of zeros from older writers."""
    name = "weight_zero_point"
    if name not in group.tensors and (scheme.symmetric or scheme.kind == "float"):
        return None
    packed = codes.dtype in WORDS and scheme.strategy in {"group", "channel"}
    if packed and name in group.tensors and group.tensors[name].dtype in WORDS:
        return require(group, name, dtypes=WORDS, shape=(-(-grid[0] * scheme.bits // WORD), grid[1]))
    return _grid(group, name, (torch.int8, *FP8, *FLOATS), grid)


def _order(group: TensorGroup, inputs: int, groups: int) -> Tensor | None:
    """The group of each input as int64 [I], or None where the groups lie one after another."""
    if "weight_g_idx" not in group.tensors:
        return None
    order = require(group, "weight_g_idx", dtypes=INTEGERS, shape=(inputs,)).long()
    low, high = (int(n) for n in torch.aminmax(order))
    if low == -1:  # the library's own mark of one that was never set
        return None
    if low < 0 or high >= groups:
        raise CheckpointError(
            f"{group.module}: weight_g_idx names groups {low} to {high}, but there are {groups}; {_AGAIN}"
        )
    return order


def _divisor(group: TensorGroup, scheme: Scheme) -> Tensor | None:
    """What FP4 scales are divided by, a float32 scalar; only tensor_group has it."""
    if "weight_global_scale" not in group.tensors and scheme.strategy != "tensor_group":
        return None
    return _grid(group, "weight_global_scale", FLOATS, (1, 1)).float().reshape(())


_AGAIN = "download the checkpoint again"
