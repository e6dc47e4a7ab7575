"""Grids of integers for a weight: the scales and zero points of each group of it, and the codes nearest to it there.

A grid is found as GPTQ finds it (github.com/IST-DASLab/gptq, quant.py `Quantizer`), with two differences. A scale is
rounded to the dtype in which it will be stored, float16 or another, before any code is chosen: a code is the nearest on
the grid that is read back. And a symmetric group whose weights are all positive gets the scale of its largest one like
any other; GPTQ takes half of it there, and cuts off the upper half of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.errors import NonFinite
from pipeline.formats.components import all_finite
from pipeline.formats.rounded import Rounded

# The smallest float16 above zero, and no normal one: in 8 bits a group has a step below 6.1e-5, the smallest normal,
# as soon as its weights stay under 0.008.
SMALLEST_SCALE = 2.0**-24
SHRINKS = tuple(1 - i / 100 for i in range(80))
NORM = 2.4
AT_ONCE = 1 << 18  # weights that are worked on together: they and a copy or two stay in the processor's cache


def find_grid(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    mse: bool = False,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """Scales [O, G] in `dtype`, zero points uint8 [O, G] for float32 `weight` [O, I]; G groups of consecutive inputs.

    A grid spans its group's extremes and zero. `mse` tries 80 ranges, from the whole down to a fifth, and takes the
    one whose errors, to the power of 2.4, have the least sum. `group_size` -1 is one group; it divides I. Raise
    NonFinite where a scale is beyond `dtype`, or a weight no number.
    """
    outputs, inputs = weight.shape
    size = inputs if group_size == -1 else group_size
    assert inputs % size == 0, "check_target refuses it"
    grouped = weight.reshape(outputs, inputs // size, size)
    low, high = _extremes(grouped, symmetric=symmetric)
    scales, zeros = _spanning(low, high, bits=bits, symmetric=symmetric, dtype=dtype)
    if not all_finite(scales):
        raise NonFinite(
            f"the weights hold NaN, or values so large that no {str(dtype).removeprefix('torch.')} scale reaches them; "
            "train again with a lower learning rate, or quantize to bitsandbytes"
        )
    if mse:
        for rows in _chunks(weight):
            scales[rows], zeros[rows] = _searched(
                grouped[rows], low[rows], high[rows], bits=bits, symmetric=symmetric, dtype=dtype
            )
    return scales, zeros.to(torch.uint8)


def nearest(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    mse: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Rounded:
    """float32 `weight` [O, I], each weight by itself, on the grid that `find_grid` finds."""
    scales, zeros = find_grid(weight, bits=bits, group_size=group_size, symmetric=symmetric, mse=mse, dtype=dtype)
    groups = consecutive(weight.shape[1], scales.shape[1], weight.device)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    return onto(weight, Rounded(bits=bits, codes=codes, scales=scales, zeros=zeros, groups=groups))


def onto(weight: Tensor, grid: Rounded) -> Rounded:
    """float32 `weight` [O, I], each weight by itself, on the scales, zero points and groups of `grid`."""
    groups, top = grid.groups.long(), 2**grid.bits - 1
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for rows in _chunks(weight):
        scales = torch.index_select(divisors(grid.scales[rows]), 1, groups)
        zeros = torch.index_select(grid.zeros[rows].float(), 1, groups)
        codes[rows] = torch.div(weight[rows], scales, out=scales).round_().add_(zeros).clamp_(0, top)
    return replace(grid, codes=codes)


def divisors(scales: Tensor) -> Tensor:
    """Stored `scales` as float32, those that are zero as the smallest: other writers give a row of zeros such."""
    return scales.float().masked_fill_(scales == 0, SMALLEST_SCALE)


def consecutive(inputs: int, groups: int, device: torch.device) -> Tensor:
    """int32 [I]: the group of each input where groups of one size lie one after another."""
    return torch.arange(inputs, dtype=torch.int32, device=device) // (inputs // groups)


def _extremes(grouped: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The least and the largest of each group, zero among them; -1 and 1 where all are zero, for want of a scale."""
    low, high = grouped.amin(-1).clamp_(max=0), grouped.amax(-1).clamp_(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = low == high
    return low.masked_fill_(empty, -1), high.masked_fill_(empty, 1)


def _spanning(low: Tensor, high: Tensor, *, bits: int, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scales in `dtype` that divide low … high in 2 ** bits - 1 steps, and the zero points, as float32."""
    top = 2**bits - 1
    smallest = SMALLEST_SCALE if dtype == torch.float16 else torch.finfo(dtype).tiny
    scales = ((high - low) / top).to(dtype).clamp_(min=smallest)
    if symmetric:
        return scales, torch.full_like(low, 2 ** (bits - 1))
    return scales, torch.round(-low / scales.float()).clamp_(0, top)


def _searched(
    grouped: Tensor, low: Tensor, high: Tensor, *, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The scales and zero points of the shrunk range with the least error."""
    grouped, found = grouped.contiguous(), None
    for shrink in SHRINKS:
        scales, zeros = _spanning(low * shrink, high * shrink, bits=bits, symmetric=symmetric, dtype=dtype)
        error = _error(grouped, scales, zeros, top=2**bits - 1)
        if found is None:
            found = scales, zeros, error
            continue
        better = error < found[2]
        found = (
            torch.where(better, scales, found[0]),
            torch.where(better, zeros, found[1]),
            torch.where(better, error, found[2]),
        )
    assert found is not None
    return found[0], found[1]


def _error(grouped: Tensor, scales: Tensor, zeros: Tensor, *, top: int) -> Tensor:
    """The sum of each group's errors to the power of NORM."""
    steps, zeros = scales.float().unsqueeze(-1), zeros.unsqueeze(-1)
    rounded = (grouped / steps).round_().add_(zeros).clamp_(0, top).sub_(zeros).mul_(steps)
    # Three times as fast as pow; the logarithm of zero is minus infinity, whose power is zero again.
    return rounded.sub_(grouped).abs_().log2_().mul_(NORM).exp2_().sum(-1)


def _chunks(weight: Tensor) -> Iterator[slice]:
    """The rows of `weight`, in slices of about AT_ONCE weights."""
    step = max(1, AT_ONCE // weight.shape[1])
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))
