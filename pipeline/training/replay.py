"""The architecture's own head, dropout and loss on what its base model once returned.

A stub stands in place of the base model and returns the kept positions. Which ones a head looks at is tried, not looked
up in a table: the fewest whose replay gives the logits of the real forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from pipeline.encoding import IGNORED
from pipeline.errors import UnsupportedFormat
from pipeline.labelled import padded_ids
from pipeline.training.feature_rows import LabelledRows, PositionRows, Rows, tagged_rows
from pipeline.training.features import Features, Kept, padded_length

TOLERANCE = 1e-3  # of the largest logit: what another shape of the same product rounds otherwise
SAMPLE = 4  # rows that are compared


class Replay(nn.Module):
    """A classifier whose base model is replaced, until `undo`, by what was kept of it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._prefix = str(model.base_model_prefix)
        base = getattr(model, self._prefix)
        self._base = [base]  # in a list: it is no part of what trains
        self._pad = _pad(model)
        setattr(model, self._prefix, _Stub(getattr(base, "pooler", None)))
        self.model = model

    def undo(self) -> None:
        """Put the base model back."""
        setattr(self.model, self._prefix, self._base[0])

    def release(self) -> Replay:
        """Let go of the base model, which nothing needs from here on; return this."""
        self._base.clear()
        return self

    def forward(self, features: Tensor, labels: Tensor | None = None, mask: Tensor | None = None) -> Any:
        """What the classifier returns: `features` are one position [B, H] or all of them [B, T, H] with their mask."""
        if features.ndim == 2:  # noqa: PLR2004 - one position a row
            features = features[:, None]
        if mask is None:
            mask = torch.ones(features.shape[:2], dtype=torch.int64, device=features.device)
        getattr(self.model, self._prefix).hidden = features
        # Any token that is no padding: a decoder's head looks for the last such.
        ids = torch.where(mask.to(torch.bool), int(self._pad == 0), self._pad)
        return self.model(input_ids=ids, attention_mask=mask, labels=labels)


class _Stub(nn.Module):
    """Returns what it was given, and what the base model's own pooler makes of it."""

    def __init__(self, pooler: Any) -> None:
        super().__init__()
        self.pooler = pooler if isinstance(pooler, nn.Module) else None
        self.hidden: Tensor | None = None

    def forward(self, *_: Any, **_options: Any) -> Any:
        hidden, self.hidden = self.hidden, None
        pooled = None if self.pooler is None else self.pooler(hidden)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)


def kept_of(model: Any, rows: Sequence[Sequence[int]], *, sequence_length: int, pad_token: int) -> Kept:
    """What to keep of the base model for the head that is on it, found on a few of `rows`.

    Raise UnsupportedFormat where no kept positions give the head's logits.
    """
    by_length = sorted(rows, key=len)
    sample = [by_length[i * (len(rows) - 1) // max(1, SAMPLE - 1)] for i in range(SAMPLE)]
    length = padded_length(len(sample[-1]), sequence_length)
    device = next(model.parameters()).device
    batch = {
        name: tensor.to(device)
        for name, tensor in padded_ids(sample, pad_token=pad_token, length=length).items()
    }  # fmt: skip
    model.eval()
    hidden, logits = _real(model, batch)
    for kept in _candidates(model, tagging=logits.ndim == 3):  # noqa: PLR2004 - logits for each token
        if _same(model, kept, hidden, batch, logits):
            return kept
    raise UnsupportedFormat(
        f"{type(model).__name__}: its head looks at more than the hidden states of its rows, so they cannot stand for "
        "the backbone; set train.engine: trainer"
    )


def head_rows(features: Features, labels: Sequence[Any], kept: Kept, *, tagging: bool, regression: bool) -> Rows:
    """Rows for the loop; `labels` hold a class number or a figure for each row, for tagging a list of class numbers."""
    if tagging:
        return tagged_rows(features, labels)
    flat = torch.tensor(labels, dtype=torch.float32 if regression else torch.int64)
    if kept.name == EVERY:
        return PositionRows(features=features, labels=flat)
    return LabelledRows(features=features, labels=flat)


EVERY = "every position"


def _candidates(model: Any, *, tagging: bool) -> list[Kept]:
    pad = _pad(model)

    def last(hidden: Tensor, _: Tensor, ids: Tensor) -> Tensor:
        # transformers' GenericForSequenceClassification: the rightmost token that is not the padding's, or the first
        places = (torch.arange(ids.shape[1], device=ids.device) * (ids != pad)).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), places]

    every = Kept(
        name=EVERY, count=lambda length: length, select=lambda hidden, mask, _: hidden[mask.to(torch.bool)]
    )  # fmt: skip
    if tagging:
        return [every]
    first = Kept(name="first position", count=lambda _: 1, select=lambda hidden, _mask, _ids: hidden[:, 0])
    return [Kept(name=f"last position but {pad}", count=lambda _: 1, select=last), first, every]


@torch.no_grad()
def _real(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The base model's hidden states, and the logits that the head makes of them."""
    found: list[Tensor] = []
    base = getattr(model, model.base_model_prefix)
    handle = base.register_forward_hook(lambda _, _inputs, output: found.append(output.last_hidden_state))
    try:
        logits: Tensor = model(**batch).logits
    finally:
        handle.remove()
    return found[0], logits


@torch.no_grad()
def _same(model: Any, kept: Kept, hidden: Tensor, batch: dict[str, Tensor], logits: Tensor) -> bool:
    mask = batch["attention_mask"]
    vectors = kept.select(hidden, mask, batch["input_ids"])
    replay = Replay(model).eval()
    try:
        if kept.name == EVERY:
            whole = torch.zeros_like(hidden)
            whole[mask.to(torch.bool)] = vectors
            found = replay(whole, mask=mask).logits
        else:
            found = replay(vectors).logits
    except (
        ValueError,
        RuntimeError,
        IndexError,
        AttributeError,
        TypeError,
    ):  # a head that wants more than the stub gives
        return False
    finally:
        replay.undo()
    if logits.ndim == 3:  # noqa: PLR2004 - logits for each token, of which padding's mean nothing
        logits, found = logits[mask.to(torch.bool)], found[mask.to(torch.bool)]
    scale = float(logits.abs().max().clamp(min=1e-6))
    return found.shape == logits.shape and float((found - logits).abs().max()) <= TOLERANCE * scale


def _pad(model: Any) -> int:
    pad = model.config.get_text_config().pad_token_id
    return IGNORED if pad is None else int(pad)
