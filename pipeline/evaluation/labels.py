"""The figures of classifiers, taggers, regressors and projectors, from what they answered. Pure; float64 throughout.

A row whose answer is not finite has no label: with one of them every figure is NaN, which no gate lets through.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_BLOCK = 1024  # anchors compared with every positive at once
_TIED = 1e-9  # cosines that differ by less are the same: sums in another order


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of rows whose largest logit is their label's: logits [N, K], labels int64 [N]."""
    return _mean(logits.argmax(dim=-1) == labels) if _finite(logits) else math.nan


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """The mean of each label's F1, 2 TP / (2 TP + FP + FN), whatever its number of rows: logits [N, K], labels [N].

    Over the labels that are some row's own or some row's prediction; one that is neither says nothing.
    """
    if not _finite(logits):
        return math.nan
    predicted = logits.argmax(dim=-1)
    right = torch.bincount(labels[predicted == labels], minlength=logits.shape[-1]).double()
    seen = (torch.bincount(found, minlength=logits.shape[-1]).double() for found in (labels, predicted))
    both = sum(seen, start=torch.zeros_like(right))  # 2 TP + FP + FN
    present = both > 0
    return float((2 * right[present] / both[present]).mean())


def kl_divergence(logits: Tensor, reference: Tensor) -> float:
    """The mean over rows of KL(reference || model), in nats: both [N, K]."""
    wanted = torch.log_softmax(reference.double(), dim=-1)
    found = torch.log_softmax(logits.double(), dim=-1)
    return float((wanted.exp() * (wanted - found)).sum(dim=-1).mean())


def agreement(logits: Tensor, reference: Tensor) -> float:
    """The share of rows for which both have their largest logit at the same label: both [N, K]."""
    if not (_finite(logits) and _finite(reference)):
        return math.nan
    return _mean(logits.argmax(dim=-1) == reference.argmax(dim=-1))


def root_mean_squared_error(predicted: Tensor, wanted: Tensor) -> float:
    """The root of the mean squared difference: both [N]."""
    return float((predicted.double() - wanted.double()).square().mean().sqrt())


def nearest(anchors: Tensor, positives: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """For each anchor the positive that is nearest by cosine, and whether that is its own.

    anchors [N, D], positives [M, D], own int64 [N]: which of the positives belongs to the anchor. Returns int64 [N],
    the first of equals, and float64 [N], which is 1 / m where the own positive is one of m equally near: a projector
    that gives every text the same vector is right by chance alone. NaN where a vector is not finite.
    """
    if not (_finite(anchors) and _finite(positives)):
        return torch.zeros(len(anchors), dtype=torch.int64), torch.full((len(anchors),), math.nan, dtype=torch.float64)
    units = functional.normalize(positives.double(), dim=-1)
    found, right = [], []
    for block, mine in zip(torch.split(anchors, _BLOCK), torch.split(own, _BLOCK), strict=True):
        cosines = functional.normalize(block.double(), dim=-1) @ units.T
        near = cosines >= cosines.amax(dim=-1, keepdim=True) - _TIED
        found.append(near.int().argmax(dim=-1))
        right.append(near.gather(1, mine[:, None])[:, 0].double() / near.sum(dim=-1))
    return torch.cat(found), torch.cat(right)


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
