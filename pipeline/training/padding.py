"""Token ids of several rows as one batch, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def right_padded(rows: Sequence[Sequence[int]], *, pad_token: int, length: int | None = None) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 [B, T], padded on the right to `length` or the longest row."""
    length = max(map(len, rows)) if length is None else length
    ids = [[*row, *[pad_token] * (length - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def padded_pairs(
    anchors: Sequence[list[int]],
    positives: Sequence[list[int]],
    negatives: Sequence[list[int] | None],
    *,
    pad_token: int,
) -> dict[str, Tensor]:
    """What ProjectedModel takes for pairs, such as `anchor_input_ids`; negatives only of the rows that have one.

    The labels say what is right: the positive of row i is the i-th.
    """
    parts = {"anchor": anchors, "positive": positives, "negative": [row for row in negatives if row is not None]}
    found = {
        f"{part}_{name}": tensor
        for part, rows in parts.items()
        if rows
        for name, tensor in right_padded(rows, pad_token=pad_token).items()
    }
    return {**found, "labels": torch.arange(len(anchors))}
