"""bitsandbytes' dynamic 8-bit data type, in which double quantization keeps the scales of NF4 and FP4.

Its 256 values are denser towards zero (arXiv 1511.04561; bitsandbytes, functional.py `create_dynamic_map`).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

NESTED = 256  # scales that share an outer scale
_TILE = 127 * NESTED  # scales at a time, fewer than torch shares out among threads
_STEPS = (1 << 16) - 1
_EXPONENTS = 7


def nest(scales: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8 [B], and outer scales, float32 [ceil(B / 256)], of `scales` - `offset`, float32 [B] and [].

    bitsandbytes does not look for the nearest value itself: it takes the nearest of 65,536 steps from -1 to 1, then the
    code that lies nearest to that step (csrc/cpu_ops.cpp `quantize_cpu`, `build_quantize_lut`).
    """
    codes = torch.empty(scales.shape, dtype=torch.uint8, device=scales.device)
    outer = torch.empty(-(-scales.numel() // NESTED), device=scales.device)
    table = _codes_of_steps().to(scales.device)
    for first in range(0, scales.numel(), _TILE):
        part = scales[first : first + _TILE] - offset
        blocks = torch.nn.functional.pad(part, (0, -part.numel() % NESTED)).view(-1, NESTED)
        largest = torch.amax(blocks.abs(), 1, out=outer[first // NESTED :][: len(blocks)])
        # Where the outer scale is zero or next to it, 0 / 0 is code 0 there as well.
        quotients = (blocks * (1.0 / largest)[:, None]).clamp_(-1, 1).nan_to_num_(-1.0)
        steps = quotients.add_(1.0).mul_(0.5 * _STEPS).add_(0.5).int()
        # Not table[steps]: that alone would start torch's threads, and wait for them.
        codes[first : first + _TILE] = torch.index_select(table, 0, steps.flatten()[: part.numel()])
    return codes, outer


@cache
def dynamic_map() -> Tensor:
    """What the 256 codes stand for: float32 [256], ascending."""
    values = [0.0, 1.0]
    for exponent in range(_EXPONENTS):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = (bounds[:-1] + bounds[1:]) / 2.0
        power = 10 ** (exponent - _EXPONENTS + 1)
        values += (power * means).tolist() + (-power * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


@cache
def _codes_of_steps() -> Tensor:
    """The code of each of the 65,536 steps: uint8 [65536]."""
    values = dynamic_map()
    steps = (2.0 * torch.arange(_STEPS + 1, dtype=torch.float32)) / _STEPS - 1.0
    return torch.bucketize(steps, 0.5 * (values[:-1] + values[1:])).to(torch.uint8)
