"""Whether training survives rounding: what of a changed weight would be left on the grid that the weight came from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.formats.rounded import Rounded
from pipeline.quantization.grids import onto

ROUNDED_AWAY = 1e-3  # share of changed codes below which a change is as good as none
WEIGHTS_AT_ONCE = 1 << 20
NAMED = 3  # modules that a sentence names


@dataclass(frozen=True, slots=True, kw_only=True)
class Survival:
    """What training did to a module: `changed_codes` is the share of its codes that are others on the source's grid.

    `change_in_steps` is the root mean square of what its weights changed by, over the grid's mean scale.
    """

    changed_codes: float
    change_in_steps: float

    @property
    def rounded_away(self) -> bool:
        """Whether rounding to nearest on the source's grid would undo the change."""
        return self.change_in_steps > 0 and self.changed_codes < ROUNDED_AWAY


def survival(weight: Tensor, source: Rounded, dtype: torch.dtype) -> Survival:
    """What became of `source`, dequantized to `dtype`, in float32 `weight` [O, I].

    The codes before are those nearest to the dequantized weight: in bfloat16 8-bit codes are not always the source's.
    """
    outputs, inputs = weight.shape
    step = max(1, WEIGHTS_AT_ONCE // inputs)
    changed = torch.zeros((), dtype=torch.int64, device=weight.device)
    squared = torch.zeros((), dtype=torch.float64, device=weight.device)
    for start in range(0, outputs, step):
        rows = slice(start, min(start + step, outputs))
        part = source.rows(rows)
        before = part.dense().to(dtype).float()
        changed += (onto(weight[rows], part).codes != onto(before, part).codes).sum()
        squared += before.sub_(weight[rows]).square_().sum(dtype=torch.float64)
    scale = float(source.scales.abs().mean(dtype=torch.float64))
    moved = math.sqrt(float(squared) / weight.numel())
    return Survival(
        changed_codes=int(changed) / weight.numel(),
        change_in_steps=moved / scale if scale else float(moved > 0),
    )


def rounded_away(found: Mapping[str, Survival]) -> tuple[str, ...]:
    """The modules whose training would be undone, sorted."""
    return tuple(sorted(module for module, one in found.items() if one.rounded_away))


def sentence(variant: str, found: Mapping[str, Survival], *, grid: str) -> str | None:
    """What to tell of the modules whose training would be undone, where there are any."""
    modules = rounded_away(found)
    if not modules:
        return None
    names = ", ".join(modules[:NAMED]) + (", …" if len(modules) > NAMED else "")
    better = "" if grid == "better" else "grid: better, "
    return (
        f"{variant}: on the source's grid rounding would undo the training of {len(modules)} of {len(found)} changed "
        f"modules, fewer than {ROUNDED_AWAY:.1%} of whose codes change ({names}); use more bits, {better}a higher "
        "learning rate or rank, or train longer"
    )
