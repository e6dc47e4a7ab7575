"""Scales and zero points laid over a weight in tiles: groups, channels, blocks, or the whole tensor.

A grid [..., ceil(O / height), ceil(I / width)] holds one value for each tile of height x width weights; the last tile
of a row or column may be cut short.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def rows_of(grid: Tensor, height: int, first: int, last: int) -> Tensor:
    """What a whole weight's grid holds for its rows first .. last: [..., last - first, G], or [..., 1, G] for all."""
    part = grid[..., first // height : -(-last // height), :]
    if height == 1 or part.shape[-2] == 1:
        return part
    start = first % height
    return part.repeat_interleave(height, dim=-2)[..., start : start + last - first, :]


def tiles(weight: Tensor, rows: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of `weight` [..., R, I], each with the values for it from `rows` [..., R or 1, ceil(I / width)].

    They broadcast against each other, so that an operation in place on a view is done to the weight.
    """
    whole = weight.shape[-1] // width
    if whole:
        yield weight[..., : whole * width].view(*weight.shape[:-1], whole, width), rows[..., :whole, None]
    if weight.shape[-1] % width:
        yield weight[..., whole * width :], rows[..., whole:]


def scale(weight: Tensor, rows: Tensor, width: int) -> Tensor:
    """`weight` itself, each tile multiplied in place by its scale."""
    for part, scales in tiles(weight, rows, width):
        part.mul_(scales)
    return weight
