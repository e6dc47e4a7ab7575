"""Rows of cached features as batches: what a step of the loop is given, gathered by row number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from pipeline.encoding import IGNORED
from pipeline.training.features import Features


class Rows(Protocol):
    """What the loop trains on."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """The keyword arguments of the module for the rows of these numbers, int64 [B]; `labels` among them."""
        ...

    def judged(self, rows: Tensor) -> int:
        """Labels that the mean loss of these rows is a mean of."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledRows:
    """One vector and one label a row: class numbers, int64 [N], or numbers, float32 [N]."""

    features: Features
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """`features` float32 [B, H] and `labels` [B]."""
        return {"features": self.features.pooled(rows), "labels": self.labels.index_select(0, rows)}

    def judged(self, rows: Tensor) -> int:
        """One a row."""
        return len(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRows:
    """Anchors, positives and negatives: `features` of the texts that `pair_texts` lines up."""

    features: Features
    negative: Tensor

    def __len__(self) -> int:
        return len(self.negative)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """`features` and `positive` [B, H], `negative` [M, H] where any of the rows has one, `labels` 0 to B - 1."""
        found = {
            "features": self.features.pooled(rows),
            "positive": self.features.pooled(rows + len(self)),
            "labels": torch.arange(len(rows)),
        }
        negative = self.negative.index_select(0, rows)
        if len(negative := negative[negative >= 0]):
            found["negative"] = self.features.pooled(negative)
        return found

    def judged(self, rows: Tensor) -> int:
        """One a row."""
        return len(rows)


def pair_texts(
    anchors: Sequence[list[int]], positives: Sequence[list[int]], negatives: Sequence[list[int] | None]
) -> tuple[list[list[int]], Tensor]:
    """The token ids of all texts, one after another, and for each row the number of its negative, or -1."""
    given = [negative for negative in negatives if negative is not None]
    upcoming = iter(range(len(anchors) + len(positives), len(anchors) + len(positives) + len(given)))
    where = [-1 if negative is None else next(upcoming) for negative in negatives]
    return [*anchors, *positives, *given], torch.tensor(where, dtype=torch.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionRows:
    """All positions of a row, with one label a row, [N], or one a position: flat, in the order of the rows."""

    features: Features
    labels: Tensor
    starts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """`features` float32 [B, T, H], `mask` [B, T], `labels` [B] or [B, T]."""
        features, mask = self.features.ragged(rows)
        return {"features": features, "mask": mask, "labels": self._labels(rows, mask)}

    def judged(self, rows: Tensor) -> int:
        """Labels that are not -100."""
        if self.starts is None:
            return len(rows)
        counts = self.features.counts.index_select(0, rows)
        spans = zip(self.starts.index_select(0, rows).tolist(), counts.tolist(), strict=True)
        return sum(int((self.labels[start : start + count] != IGNORED).sum()) for start, count in spans)

    def _labels(self, rows: Tensor, mask: Tensor) -> Tensor:
        if self.starts is None:
            return self.labels.index_select(0, rows)
        own = mask.to(torch.bool)
        where = self.starts.index_select(0, rows)[:, None] + torch.where(own, torch.arange(mask.shape[1]), 0)
        return torch.where(own, self.labels[where], IGNORED)


def tagged_rows(features: Features, labels: Sequence[Sequence[int]]) -> PositionRows:
    """Rows with a label a position; -100 where it is not judged."""
    lengths = torch.tensor([len(row) for row in labels], dtype=torch.int64)
    flat = torch.tensor(list(chain.from_iterable(labels)), dtype=torch.int64)
    return PositionRows(features=features, labels=flat, starts=lengths.cumsum(0) - lengths)
