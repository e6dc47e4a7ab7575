"""A weight on a grid of integers: what rounding gives, and what GPTQ's, AWQ's and compressed-tensors' layouts pack."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """W = (codes - zeros) * scales, with O outputs, I inputs and G groups of inputs that share a scale.

    `codes`: uint8 [O, I], below 2 ** bits. `scales`: [O, G], in the dtype in which they are stored. `zeros`: uint8
    [O, G], at most 2 ** bits - 1. `groups`: int32 [I], the group of each input; i // group size unless the columns were
    ordered (desc_act).
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor

    def dense(self) -> Tensor:
        """float32 [O, I], exactly what a reader of the packed tensors computes."""
        groups = self.groups.long()
        zeros, scales = self.zeros.float(), self.scales.float()
        found = self.codes.float()
        return found.sub_(torch.index_select(zeros, 1, groups)).mul_(torch.index_select(scales, 1, groups))

    def rows(self, rows: slice) -> Rounded:
        """The same of some outputs."""
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=self.zeros[rows])


def stack(parts: Sequence[Rounded]) -> Rounded:
    """Weights with the same inputs, bits and groups as one, their outputs one after another."""
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat([part.zeros for part in parts]),
    )


def split(whole: Rounded, counts: Sequence[int]) -> Iterator[Rounded]:
    """What `stack` made one of, each with its count of outputs."""
    start = 0
    for count in counts:
        yield whole.rows(slice(start, start + count))
        start += count
