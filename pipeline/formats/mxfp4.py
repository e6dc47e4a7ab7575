"""MXFP4 as gpt-oss keeps its experts.

On disk (transformers, integrations/mxfp4.py `_convert_moe_packed_tensors`), E experts of I in and O out features, G =
I / 32 groups:

- `<name>_blocks`: uint8 [E, O, G, 16]; 32 e2m1 codes for each group, the low nibble of a byte first.
- `<name>_scales`: uint8 [E, O, G]; E8M0, a power of two.

W = code * 2 ** (scale - 127), and the dense tensor `<name>` is its transpose, [E, I, O].
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.formats import tiles
from pipeline.formats.components import ALL, require, require_finite
from pipeline.formats.small_floats import E8M0, fp4_floats, scale_floats
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

BLOCK = 32  # codes that share a scale
BYTES = BLOCK // 2
AT_ONCE = 256  # outputs


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:  # noqa: ARG001 - the tensors say all
    """[E, I, O], from the shape of the blocks, checked against that of the scales."""
    blocks, _ = _tensors(group)
    experts, outputs, groups, _ = blocks.shape
    return experts, groups * BLOCK, outputs


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:  # noqa: ARG001 - the protocol's
    """float32 [R, I, O], contiguous, of the experts `rows`: exact, since scales are powers of two."""
    blocks, scales = _tensors(group)
    experts, outputs, groups, _ = blocks[rows].shape
    out = torch.empty(experts, groups * BLOCK, outputs, dtype=torch.float32, device=blocks.device)
    for expert, codes, exponents in zip(out, blocks[rows], scales[rows], strict=True):
        factors = require_finite(group, "scales", scale_floats(exponents))
        # Some outputs at a time: an expert's floats would be as many new pages again, which cost more than the math.
        for first in range(0, outputs, AT_ONCE):
            part = slice(first, first + AT_ONCE)
            weight = tiles.scale(fp4_floats(codes[part].flatten(-2)), factors[part], BLOCK)
            expert[:, part].copy_(weight.T)
    return out


def _tensors(group: TensorGroup) -> tuple[Tensor, Tensor]:
    blocks = require(group, "blocks", dtypes=(torch.uint8,), shape=(-1, -1, -1, BYTES))
    if not blocks.numel():
        raise CheckpointError(
            f"{group.module}: blocks has shape {list(blocks.shape)}, which is empty; download the checkpoint again"
        )
    return blocks, require(group, "scales", dtypes=E8M0, shape=tuple(blocks.shape[:-1]))
