"""A scale of a linear layer's inputs, folded into what makes them.

W diag(s) applied to x / s is W x. The division costs nothing where x comes out of a norm (its weight and bias are
divided) or of a linear layer through nothing but products and sums (its rows are). `fold_search.py` finds where.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """One place for scales: `producer` is divided by them, and every weight of `consumers` multiplied along its inputs.

    `producer` is a module's name in its layer, `consumers` are weights' names: all that read the same I inputs, those
    that stay dense too (routers [E, I], fused experts [E, O, I]). `kind` says where the division goes: the weight of a
    norm, a norm that multiplies by 1 + weight (Gemma), or rows of a linear layer's weight; biases go along.

    Input i belongs to head i // `width`, and `repeats` heads in a row read the same channels (grouped queries: v_proj →
    o_proj). The channels of these heads are the producer's rows `start` + `stride` * (head // repeats) and on, for
    `width` rows. So there are C = I / repeats channels, and a scale for each.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: Literal["norm", "one_plus", "linear"]
    inputs: int
    width: int
    repeats: int = 1
    start: int = 0
    stride: int

    def rows(self) -> Tensor:
        """The producer's row for each channel, int64 [C]."""
        heads = torch.arange(self.inputs // (self.width * self.repeats))
        return (self.start + heads[:, None] * self.stride + torch.arange(self.width)).flatten()

    def expanded(self, scales: Tensor) -> Tensor:
        """What each input is scaled by, [I], from the scale of each channel, [C]."""
        return scales.view(-1, 1, self.width).expand(-1, self.repeats, -1).flatten()

    def reduced(self, values: Tensor) -> Tensor:
        """The mean of each channel, [C], over the inputs [I] that read it; of equal ones exactly their value."""
        return values.double().view(-1, self.repeats, self.width).mean(1).flatten().to(values.dtype)

    def tied(self, values: Tensor) -> Tensor:
        """Values of the inputs [I] with those that read the same channel made equal, for `awq.search_scales`."""
        return self.expanded(self.reduced(values))


def apply(fold: Fold, tensors: Mapping[str, Tensor], scales: Tensor) -> dict[str, Tensor]:
    """The layer's tensors that `fold` changes for `scales` [C], float32; `tensors` are by name in the layer."""
    inputs = fold.expanded(scales)
    changed = {name: tensors[name].float() * inputs for name in fold.consumers}
    rows = fold.rows().to(scales.device)
    for part in ("weight", "bias"):
        name = f"{fold.producer}.{part}"
        if name not in tensors:
            continue
        tensor = tensors[name].float()
        divisor = scales.view(-1, *[1] * (tensor.ndim - 1))
        if fold.kind == "one_plus" and part == "weight":
            changed[name] = (1 + tensor) / divisor - 1
        else:
            changed[name] = tensor.index_copy(0, rows, tensor[rows] / divisor)
    return changed


def attainable(fold: Fold, tensors: Mapping[str, Tensor], scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The scales [C] near `scales` [C] by which a norm that is stored in `dtype` divides exactly.

    A norm stays dense: stored as bfloat16 it would divide by a scale that is wrong by up to 0.4 %, and by much more
    where it stores weight - 1 and the scale is large. The rows of a linear layer are rounded to codes only after they
    were divided: there any scale will do, and `scales` come back.
    """
    if fold.kind == "linear":
        return scales
    offset, least = (1.0, torch.finfo(dtype).eps / 2) if fold.kind == "one_plus" else (0.0, torch.finfo(dtype).tiny)
    before = tensors[f"{fold.producer}.weight"].float() + offset
    after = (before / scales - offset).to(dtype).float() + offset
    after = torch.where(after.abs() < least, before.sign() * least, after)
    return torch.where(before == 0, scales, before / after)
