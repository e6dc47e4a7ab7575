"""A feature out of hidden states: the last real token's, the mean of the real tokens', the first real token's.

Hidden states are [B, T, H] of any float dtype, the attention mask [B, T] is 1 at real tokens and 0 at padding, on
either side; every row has at least one real token. What comes out is float32 [B, H], and never depends on padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.sections import Pooling


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden state of each row's last real token."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return _at(hidden, (places * mask.to(places.dtype)).argmax(1))


def mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean, in float32, of the hidden states of each row's real tokens."""
    real = mask.to(torch.bool).unsqueeze(-1)
    # Chosen, not multiplied by zero: padding may hold NaN or infinity.
    total = torch.where(real, hidden.to(torch.float32), 0.0).sum(1)
    return total / real.sum(1).clamp(min=1)


def cls(hidden: Tensor, mask: Tensor) -> Tensor:
    """The hidden state of each row's first real token, which encoders are trained to put the whole text into."""
    return _at(hidden, mask.to(torch.int64).argmax(1))


def _at(hidden: Tensor, places: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), places].to(torch.float32)


POOLINGS: Mapping[Pooling, Callable[[Tensor, Tensor], Tensor]] = {"last_token": last_token, "mean": mean, "cls": cls}
