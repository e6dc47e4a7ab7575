"""The figures of next-token prediction, from logits. Pure; float32 throughout, sums in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.encoding import IGNORED


@dataclass(slots=True, kw_only=True)
class Totals:
    """Sums over the predicted tokens seen so far."""

    tokens: int = 0
    negative_log_likelihood: float = 0.0
    divergence: float = 0.0
    agreeing: int = 0

    @property
    def perplexity(self) -> float:
        """Exp of the mean negative log-likelihood; infinite where that overflows."""
        mean = self.negative_log_likelihood / self.tokens
        return math.exp(mean) if mean < 700 else math.inf  # noqa: PLR2004  # exp(709) is the largest float64


def add(totals: Totals, logits: Tensor, labels: Tensor, reference: Tensor | None) -> None:
    """Count a batch: logits [B, T, V] of the model, labels [B, T] int64 (-100: not counted), the reference's logits.

    Position t predicts label t + 1. The divergence is KL(reference || model), in nats.
    """
    counted = labels[:, 1:] != IGNORED
    targets = labels[:, 1:][counted]
    scores = torch.log_softmax(logits[:, :-1][counted].float(), dim=-1)
    totals.tokens += int(targets.numel())
    totals.negative_log_likelihood -= float(scores.gather(1, targets[:, None]).double().sum())
    if reference is not None:
        wanted = torch.log_softmax(reference[:, :-1][counted].float(), dim=-1)
        totals.divergence += float((wanted.exp() * (wanted - scores)).sum(dim=-1).double().sum())
        totals.agreeing += int((wanted.argmax(dim=-1) == scores.argmax(dim=-1)).sum())
