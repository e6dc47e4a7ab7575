"""What a classifier, regressor, tagger or projector says of rows of tokens: its logits, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline import progress
from pipeline.evaluation.load import device
from pipeline.labelled import padded_ids

BATCH_TOKENS = 4096  # padding included; what a batch of so many keeps in memory is small beside a model


@torch.inference_mode()
def answers(model: Any, rows: Sequence[list[int]], *, pad_token: int | None, stage: str) -> list[Tensor]:
    """The logits of each row of token ids, float32 on the CPU: [K], or [T, K] where each token has its own.

    Rows are padded on the right with the model's own padding token, or else `pad_token`, or one that no row ends with.
    """
    padding = _padding(model, rows, pad_token)
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    done = 0
    for batch in _batches(rows, alone=padding is None):
        given = padded_ids([rows[i] for i in batch], pad_token=padding or 0)
        logits = model(**{name: tensor.to(device()) for name, tensor in given.items()}).logits
        for i, row in zip(batch, logits.float().cpu(), strict=True):
            found[i] = row[: len(rows[i])] if row.ndim > 1 else row
        done += len(batch)
        progress.step(stage, done=done, total=len(rows), unit="rows")
    return found


def _batches(rows: Sequence[list[int]], *, alone: bool) -> Iterator[list[int]]:
    """The numbers of the rows, in batches of rows of like length."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and (alone or (len(batch) + 1) * len(rows[i]) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _padding(model: Any, rows: Sequence[list[int]], pad_token: int | None) -> int | None:
    """The token to pad with, which the model's config then names; None where no token will do.

    A decoder's classifier reads the last token that is not its config's padding token, whatever the attention mask
    says, and refuses batches where its config names none (transformers, `GenericForSequenceClassification`).
    """
    config = model.config.get_text_config()
    own = getattr(config, "pad_token_id", None)
    if own is not None and own >= 0:
        return int(own)
    ends = {row[-1] for row in rows}
    wanted = [] if pad_token is None else [pad_token]
    free = next((token for token in (*wanted, *range(config.vocab_size)) if token not in ends), None)
    config.pad_token_id = free
    return free
