"""torchao's tensor subclasses that keep one element in each place: int8, any intN, and float8.

On disk (torchao 0.18, prototype/safetensors/safetensors_support.py `flatten_tensor_state_dict`; transformers saves the
same), O x I weights in blocks of `block_size` [r, c], O / r x I / c blocks:

- `_weight_qdata`: int8 or float8 [O, I].
- `_weight_scale`: a float for each block, in any shape that has as many.
- `_weight_zero_point`: int8, likewise; absent for float8.
- the header's `__metadata__` maps the dense tensor's name to a JSON object: `_type`, the class, and `_data`, its
  attributes, `block_size` among them.

W = (code - zero) * scale (quantization/quant_primitives.py `_dequantize_affine`). How activations are quantized is not
a matter of the weight. Int4's classes are packed for one kernel each, which CPUs cannot write.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, UnsupportedFormat
from pipeline.formats.components import ALL, FLOATS, require, require_finite
from pipeline.formats.small_floats import fp8_floats
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

CODES = {
    "Int8Tensor": (torch.int8,),
    "IntxUnpackedToInt8Tensor": (torch.int8,),
    "Float8Tensor": (torch.float8_e4m3fn, torch.float8_e5m2),
}
ZEROS = (torch.int8, torch.int32, *FLOATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    codes: Tensor
    scales: Tensor  # [blocks down, blocks along]
    zeros: Tensor | None  # likewise
    height: int  # of a block


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:
    """[O, I], the codes' own shape, checked against scale and zero point."""
    return tuple(_layout(group, quantization).codes.shape)


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
    """float32 [R, I]: (code - zero) * scale, exact; torchao rounds the same products to the model's dtype."""
    layout = _layout(group, quantization)
    first, last, _ = rows.indices(len(layout.codes))
    which = torch.arange(first, last, device=layout.codes.device) // layout.height
    scales = require_finite(group, "weight_scale", layout.scales[which].float())
    codes = layout.codes[first:last]
    out = require_finite(group, "weight_qdata", fp8_floats(codes)) if codes.is_floating_point() else codes.float()
    blocks = out.view(last - first, scales.shape[1], -1)
    if layout.zeros is not None:
        blocks.sub_(layout.zeros[which].float()[:, :, None])
    blocks.mul_(scales[:, :, None])
    return out


def _layout(group: TensorGroup, quantization: Quantization) -> _Layout:
    kind, block = _described(group, quantization)
    codes = require(group, "weight_qdata", dtypes=CODES[kind], shape=(-1, -1))
    if "weight_act_pre_scale" in group.tensors:
        raise UnsupportedFormat(
            f"{group.module}: torchao with act_pre_scale cannot be read; load it with transformers and torchao"
        )
    if len(block) != codes.ndim or min(block) < 1 or any(n % b for n, b in zip(codes.shape, block, strict=True)):
        raise CheckpointError(
            f"{group.module}: weight_qdata has shape {list(codes.shape)}, which blocks of {list(block)} do not divide; "
            "download the checkpoint again"
        )
    grid = (codes.shape[0] // block[0], codes.shape[1] // block[1])
    named = "weight_zero_point" in group.tensors and kind != "Float8Tensor"
    return _Layout(
        codes=codes,
        scales=_spread(group, "weight_scale", grid, dtypes=FLOATS),
        zeros=_spread(group, "weight_zero_point", grid, dtypes=ZEROS) if named else None,
        height=block[0],
    )


def _spread(group: TensorGroup, name: str, grid: tuple[int, int], *, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The values of the blocks, one for each, [blocks down, blocks along]."""
    values = require(group, name, dtypes=dtypes)
    if values.numel() != grid[0] * grid[1]:
        raise CheckpointError(
            f"{group.module}: {name} has shape {list(values.shape)}, expected {grid[0]} x {grid[1]} values from "
            "the block size; download the checkpoint again"
        )
    return values.reshape(grid)


def _described(group: TensorGroup, quantization: Quantization) -> tuple[str, tuple[int, ...]]:
    """The class and the block size that the shard's metadata name."""
    text = quantization.metadata.get(group.dense_name)
    if text is None:
        raise CheckpointError(
            f"{group.dense_name}: no shard's __metadata__ says what it is; save it again with transformers and torchao"
        )
    try:
        raw = json.loads(text)
        kind, block = str(raw["_type"]), raw["_data"].get("block_size", ())
        size = tuple(int(n) for n in block)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{group.dense_name}: its __metadata__ cannot be read ({error!r}); download the checkpoint again"
        ) from error
    if kind not in CODES:
        raise UnsupportedFormat(
            f"{group.dense_name}: torchao's {kind} cannot be read, only {', '.join(CODES)}; load it with transformers "
            "and torchao on the device that it was packed for"
        )
    return kind, size
