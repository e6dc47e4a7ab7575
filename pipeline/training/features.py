"""What a frozen backbone makes of each row, computed once, kept on disk, reused by every epoch and every later run.

A row is padded on the right to its own length rounded up to a multiple of 64, at most `sequence_length`, and runs
beside rows of the same padded length. So its feature depends on the row alone, to the last bit, in float32, bf16, NF4
and GPTQ; int8 rows see their batchmates (bitsandbytes picks the outlier columns of a whole batch).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from pipeline import progress
from pipeline.errors import DataError, NonFinite
from pipeline.labelled import padded_ids
from pipeline.sections import Pooling
from pipeline.training.feature_store import FeatureSet, Index
from pipeline.training.pooling import POOLINGS
from pipeline.training.projector import base_of, hidden_states
from pipeline.training.watching import STAGE

MULTIPLE = 64  # tokens: what a padded length is a multiple of
BATCH_TOKENS = 4096  # padded tokens that the backbone is given at once
PENDING = 64 << 20  # bytes of features held before they are appended
EVERY = 10.0  # seconds between appends: what a kill loses at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is kept of a row.

    `select` takes hidden states [B, T, H], mask [B, T] and ids [B, T] and gives the rows' vectors [N, H] one after
    another, `count` says how many a row of so many tokens has; `name` stands for both in the fingerprint.
    """

    name: str
    count: Callable[[int], int]
    select: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """The features of the rows that were asked for, in their order: mapped `vectors` [N, H], and each row's place.

    `computed` rows were not there before.
    """

    vectors: Tensor
    first: Tensor
    counts: Tensor
    computed: int

    def __len__(self) -> int:
        return len(self.first)

    def pooled(self, rows: Tensor) -> Tensor:
        """float32 [B, H]: the one vector of each of the rows, by number."""
        return self.vectors.index_select(0, self.first.index_select(0, rows))

    def ragged(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [B, T, H], zero beyond a row's vectors, and the mask [B, T] of those that are its own."""
        counts = self.counts.index_select(0, rows)
        places = torch.arange(int(counts.max()))
        mask = places < counts[:, None]
        where = self.first.index_select(0, rows)[:, None] + torch.where(mask, places, 0)
        return torch.where(mask[..., None], self.vectors[where], 0.0), mask.to(torch.int64)


def pooled(pooling: Pooling) -> Kept:
    """A projector's feature: one vector a row."""
    pool = POOLINGS[pooling]
    return Kept(name=pooling, count=lambda _: 1, select=lambda hidden, mask, _: pool(hidden, mask))


def padded_length(length: int, sequence_length: int) -> int:
    """Tokens that a row of `length` is padded to."""
    return min(-(-length // MULTIPLE) * MULTIPLE, max(length, sequence_length))


def features(
    load: Callable[[], Any],
    rows: Sequence[Sequence[int]],
    *,
    folder: Path,
    backbone: str,
    dtype: str,
    kept: Kept,
    width: int,
    sequence_length: int,
    pad_token: int,
    limit_bytes: int | None = None,
) -> Features:
    """What `kept` says of each row (its token ids), from `folder` where it is there, else computed and kept there.

    `load` gives the model and is called only if rows are missing; `backbone` is the digest of its weights, `dtype` what
    it computes in, `width` its hidden size. Under several processes, which share `folder`, each computes a part. Raise
    NoSpace before anything is computed, DataError for a row without tokens, NonFinite where a feature is.
    """
    if empty := sum(not row for row in rows):
        raise DataError(f"{empty} of {len(rows)} rows have no tokens, so no feature; remove them from the data")
    store = FeatureSet(folder, {"backbone": backbone, "dtype": dtype, "kept": kept.name}, width=width)
    padded = [padded_length(len(row), sequence_length) for row in rows]
    keys = [_key(row, length) for row, length in zip(rows, padded, strict=True)]
    wanted = {key: i for i, key in enumerate(keys)}  # each once
    rank, ranks = _rank()
    with store.computing() if rank == 0 else contextlib.nullcontext():
        index = store.index()
        missing = [i for key, i in wanted.items() if key not in index.places]
        if rank == 0 and missing:
            vectors = sum(kept.count(len(rows[i])) for i in missing)
            whole = sum(kept.count(len(rows[i])) for i in wanted.values())
            store.reserve(len(missing), vectors, whole=whole, limit_bytes=limit_bytes)
        _barrier()
        index = store.index()  # making room may have begun it anew
        missing = [i for key, i in wanted.items() if key not in index.places]
        _barrier()
        progress.message(STAGE, f"features of {len(wanted) - len(missing):,} of {len(wanted):,} rows are there already")
        missing.sort(key=lambda i: (padded[i], keys[i]))
        if share := [(keys[i], rows[i], padded[i]) for i in missing[rank::ranks]]:
            _compute(store, load(), share, kept=kept, pad_token=pad_token)
        _barrier()
        index = store.index()
        found = _found(store, index, keys, computed=len(missing))
        _barrier()
    return found


def _compute(
    store: FeatureSet, model: Any, rows: list[tuple[bytes, Sequence[int], int]], *, kept: Kept, pad_token: int
) -> None:
    """Run the model over the rows (key, tokens, padded length), appending every so often."""
    base = base_of(model).eval()
    keys: list[bytes] = []
    counts: list[int] = []
    vectors: list[Tensor] = []
    done, last = 0, time.monotonic()
    for length, batch in _batches(rows):
        ids = [row for _, row, _ in batch]
        vectors.append(_kept(base, ids, length=length, kept=kept, pad_token=pad_token))
        keys += [key for key, _, _ in batch]
        counts += [kept.count(len(row)) for row in ids]
        done += len(batch)
        held = sum(vector.nbytes for vector in vectors)
        if done == len(rows) or held >= PENDING or time.monotonic() - last >= EVERY:
            store.append(keys, counts, torch.cat(vectors))
            keys, counts, vectors, last = [], [], [], time.monotonic()
        progress.step(STAGE, done=done, total=len(rows), unit="rows")


@torch.no_grad()
def _kept(base: Any, rows: list[Sequence[int]], *, length: int, kept: Kept, pad_token: int) -> Tensor:
    device = next(base.parameters()).device
    batch = {
        name: tensor.to(device)
        for name, tensor in padded_ids(rows, pad_token=pad_token, length=length).items()
    }  # fmt: skip
    hidden = hidden_states(base, **batch)
    vectors = kept.select(hidden, batch["attention_mask"], batch["input_ids"]).to("cpu", torch.float32)
    if not vectors.isfinite().all():
        raise NonFinite(
            "features: the backbone's hidden states hold NaN or infinity; its weights are damaged, or too large for "
            "the dtype that it computes in"
        )
    return vectors


def _batches(
    rows: list[tuple[bytes, Sequence[int], int]],
) -> Iterator[tuple[int, list[tuple[bytes, Sequence[int], int]]]]:
    """The rows, which come by padded length, in batches of one padded length each."""
    for length, group in itertools.groupby(rows, key=lambda row: row[2]):
        size = max(1, BATCH_TOKENS // length)
        while batch := list(itertools.islice(group, size)):
            yield length, batch


def _found(store: FeatureSet, index: Index, keys: list[bytes], *, computed: int) -> Features:
    places = torch.tensor([index.places[key] for key in keys], dtype=torch.int64).view(-1, 2)
    first, counts = places.unbind(1)
    return Features(
        vectors=store.map(index), first=first.contiguous(), counts=counts.contiguous(), computed=computed
    )  # fmt: skip


def _key(row: Sequence[int], length: int) -> bytes:
    return hashlib.sha256(array("q", [length, *row]).tobytes()).digest()


def _rank() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _barrier() -> None:
    if _rank()[1] > 1:
        distributed.barrier()
