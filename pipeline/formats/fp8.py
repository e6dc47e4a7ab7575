"""FP8, as DeepSeek, Qwen, Mistral and fbgemm store it: a byte for each weight, and scales in blocks.

On disk (transformers, integrations/finegrained_fp8.py `FP8Linear`, `FP8Experts`, `Fp8Dequantize`;
integrations/fbgemm_fp8.py), I in and O out features:

- `weight`: float8_e4m3fn or float8_e5m2 [O, I].
- `weight_scale_inv`, also called `weight_scale`, `scale` or `qscale_weight`: a multiplier under each of its names, in
  any float dtype or as E8M0 bytes; [ceil(O / b0), ceil(I / b1)] for `weight_block_size` [b0, b1] (128 x 128 unless the
  config says otherwise), [O, 1] or [O] for each output, a scalar or [1] for the whole.
- fused experts: `<name>` [E, O, I] itself, and `<name>_scale_inv` or `<name>_scale` with E in front, or [E, 1, I]; two
  rows of scales for `gate_up_proj` are its halves', however many outputs they have.
- `expert_dtype` fp4: `weight` int8 [O, I / 2], two e2m1 codes in each byte, and scales [O, I / 32].

W = code * scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, MissingTensor
from pipeline.formats import tiles
from pipeline.formats.components import ALL, FLOATS, require, require_finite
from pipeline.formats.small_floats import E8M0, FP8, fp4_floats, fp8_floats, scale_floats
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

SCALES = ("weight_scale_inv", "weight_scale", "qscale_weight", "scale", "scale_inv")
FP4 = (torch.int8, torch.uint8)
FP4_BLOCK = (1, 32)
DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """Codes [..., O, I] and their grid of scales [..., rows, columns], each for `block` = (height, width) weights."""

    codes: Tensor
    scales: Tensor
    block: tuple[int, int]
    shape: tuple[int, ...]
    scale_name: str


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:
    """[O, I], or [E, O, I] for fused experts: the weight's own, checked against that of its scales."""
    return scaled(group, quantization).shape


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
    """float32 [R, I], or [R, O, I] of the experts `rows`: code * scale, as transformers computes it."""
    return multiplied(group, scaled(group, quantization), rows)


def multiplied(group: TensorGroup, packed: Scaled, rows: slice) -> Tensor:
    """float32: `rows` of codes * scales."""
    first, last, _ = rows.indices(packed.shape[0])
    height, width = packed.block
    codes = packed.codes[first:last]
    weight = fp8_floats(codes) if codes.dtype in FP8 else fp4_floats(codes)
    if len(packed.shape) == 2:  # noqa: PLR2004 - a matrix
        scales = scale_floats(tiles.rows_of(packed.scales, height, first, last))
    else:
        scales = tiles.rows_of(scale_floats(packed.scales[first:last]), height, 0, packed.shape[-2])
    return tiles.scale(weight, require_finite(group, packed.scale_name, scales), width)


def scaled(group: TensorGroup, quantization: Quantization) -> Scaled:
    """The module's codes and scales; raise an InputError unless their dtypes and shapes fit each other."""
    name = "weight" if "weight" in group.tensors else ""
    if name not in group.tensors:
        raise MissingTensor(f"{group.module}: weight is in no shard; the checkpoint is incomplete, download it again")
    codes = require(group, name, dtypes=(*FP8, *FP4))
    scale_name, scales = _scales(group)
    four_bits = codes.dtype in FP4
    shape = (*codes.shape[:-1], codes.shape[-1] * 2) if four_bits else tuple(codes.shape)
    if len(shape) not in {2, 3} or not codes.numel():
        raise CheckpointError(
            f"{group.module}: weight has shape {list(codes.shape)}, expected a matrix, or one for each expert; "
            "download the checkpoint again"
        )
    block = FP4_BLOCK if four_bits else _block_size(quantization)
    halves = len(shape) == 3 and group.module.endswith("gate_up_proj")  # noqa: PLR2004 - experts
    grid, block = _grid(scales, shape, block, halves=halves) or _refuse(group, scale_name, scales, shape, block)
    return Scaled(codes=codes, scales=grid, block=block, shape=shape, scale_name=scale_name)


def _scales(group: TensorGroup) -> tuple[str, Tensor]:
    names = [name for name in SCALES if name in group.tensors]
    if len(names) != 1:
        found = " and ".join(names) or "none"
        raise MissingTensor(
            f"{group.module}: has {found} of the scales that FP8 weights have, expected weight_scale_inv or one of its "
            "other names; the checkpoint is incomplete, download it again"
        )
    return names[0], require(group, names[0], dtypes=(*FLOATS, *E8M0))


def _grid(
    scales: Tensor, shape: tuple[int, ...], block: tuple[int, int], *, halves: bool
) -> tuple[Tensor, tuple[int, int]] | None:
    """`scales` with the weight's rank, and how many rows and columns one of them is for; None where they do not fit."""
    *experts, outputs, inputs = shape
    if scales.numel() == 1:
        return scales.reshape([1] * len(shape)).expand(*experts, 1, 1), (outputs, inputs)
    if scales.ndim == 4 and not experts and scales.shape[1] == scales.shape[3] == 1:  # noqa: PLR2004 - a dimension of one after each block's
        scales = scales[:, 0, :, 0]  # ModelOpt writes [blocks, 1, blocks, 1]
    elif scales.ndim == 1:
        scales = scales[:, None, None] if experts else scales[:, None]
    if scales.ndim != len(shape) or list(scales.shape[:-2]) != experts:
        return None
    if halves and scales.shape[-2] == 2:  # noqa: PLR2004 - gate and up
        block = (outputs // 2, block[1])
    height = _length(outputs, scales.shape[-2], block[0])
    width = _length(inputs, scales.shape[-1], block[1])
    return (scales, (height, width)) if height and width else None


def _length(weights: int, scales: int, block: int) -> int:
    """How many of `weights` share one of `scales`; 0 where neither all, none nor `block` of them do."""
    if scales == 1:
        return weights
    if scales == weights:
        return 1
    return block if scales == -(-weights // block) else 0


def _refuse(
    group: TensorGroup, name: str, scales: Tensor, shape: tuple[int, ...], block: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    raise CheckpointError(
        f"{group.module}: {name} has shape {list(scales.shape)}, which is no scale for each block of {block[0]} x "
        f"{block[1]}, each output or the whole of a weight {list(shape)}; fix weight_block_size in config.json or "
        "download the checkpoint again"
    )


def _block_size(quantization: Quantization) -> tuple[int, int]:
    """`weight_block_size` of the config; DEFAULT_BLOCK where it has none."""
    found = quantization.raw.get("weight_block_size") or DEFAULT_BLOCK
    if (
        not isinstance(found, list | tuple)
        or len(found) != 2  # noqa: PLR2004 - rows and columns
        or not all(isinstance(n, int) and n > 0 for n in found)
    ):
        raise CheckpointError(
            f"config.json: quantization_config.weight_block_size is {found!r}, expected two positive numbers, such as "
            "[128, 128]"
        )
    return found[0], found[1]
