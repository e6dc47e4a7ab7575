"""NVIDIA ModelOpt's FP8 and NVFP4.

On disk (vllm, model_executor/layers/quantization/modelopt.py; compressed-tensors,
entrypoints/convert/converters/modelopt_nvfp4.py), I in and O out features:

- FP8: `weight` float8_e4m3fn [O, I]; `weight_scale` float32 scalar, [O], or [O / 128, 1, I / 128, 1]; W = code * scale.
- NVFP4: `weight` uint8 [O, I / 2] of e2m1, the low nibble first; `weight_scale` float8_e4m3fn [O, I / 16];
  `weight_scale_2` float32 scalar; W = code * (scale * scale_2).

`quant_algo` names one of them, or MIXED_PRECISION; the tensors of each module say which it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.formats import fp8, tiles
from pipeline.formats.components import ALL, FLOATS, require, require_finite
from pipeline.formats.small_floats import fp4_floats
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

GROUP = 16  # codes that share a scale


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:
    """[O, I], from the weight's shape, checked against that of its scales."""
    if not _is_nvfp4(group):
        return fp8.dense_shape(group, quantization)
    codes, _, _ = _nvfp4(group)
    return codes.shape[0], 2 * codes.shape[1]


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
    """float32 [R, I]: code * scale, in float32."""
    if not _is_nvfp4(group):
        return fp8.dequantize(group, quantization, rows)
    codes, scales, factor = _nvfp4(group)
    both = require_finite(group, "weight_scale", scales[rows].float() * factor)
    return tiles.scale(fp4_floats(codes[rows]), both, GROUP)


def _is_nvfp4(group: TensorGroup) -> bool:
    return "weight" in group.tensors and group.tensors["weight"].dtype == torch.uint8


def _nvfp4(group: TensorGroup) -> tuple[Tensor, Tensor, Tensor]:
    codes = require(group, "weight", dtypes=(torch.uint8,), shape=(-1, -1))
    outputs, count = codes.shape
    if not codes.numel() or 2 * count % GROUP:
        raise CheckpointError(
            f"{group.module}: weight has shape {list(codes.shape)}, which is not {GROUP} codes of four bits for each "
            "scale; download the checkpoint again"
        )
    scales = require(group, "weight_scale", dtypes=(torch.float8_e4m3fn,), shape=(outputs, 2 * count // GROUP))
    factor = require(group, "weight_scale_2", dtypes=FLOATS)
    if factor.numel() != 1:
        raise CheckpointError(
            f"{group.module}: weight_scale_2 has shape {list(factor.shape)}, expected a scalar; download the "
            "checkpoint again"
        )
    return codes, scales, factor.float().reshape(())
