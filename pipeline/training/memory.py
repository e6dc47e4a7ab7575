"""Out of memory: fewer rows at a time and more accumulation, so that every update still sees the same rows."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.errors import OutOfMemory

NAME = "micro_batch.json"
# What torch says where an allocation fails: of CUDA, of cuBLAS, of its allocator on a CPU, of the C++ library.
_SAID = ("out of memory", "alloc_failed", "can't allocate memory", "not enough memory", "bad_alloc")


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Rows of one forward pass in a process, and the passes that make one update."""

    size: int
    accumulation: int

    def smaller(self) -> MicroBatch | None:
        """The largest one of at most half the rows that keeps the rows of an update; None where there is one row."""
        rows = self.size * self.accumulation
        size = next((size for size in range(self.size // 2, 0, -1) if rows % size == 0), None)
        return None if size is None else MicroBatch(size=size, accumulation=rows // size)

    def __str__(self) -> str:
        return f"{self.size} row{'s' if self.size > 1 else ''} at a time, {self.accumulation} times an update"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)


def known_micro_batch(folder: Path) -> MicroBatch | None:
    """The one that an earlier failure left in `folder`, the run's own; None where nothing failed."""
    try:
        kept = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return MicroBatch(size=int(kept["size"]), accumulation=int(kept["accumulation"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def shrink(failed: MicroBatch, folder: Path, *, divisible: bool) -> MicroBatch:
    """A smaller micro-batch than the `failed` one, kept in `folder` for whoever goes on.

    Raise OutOfMemory where there is none, or where the loss compares the rows of a batch (not `divisible`).
    """
    smaller = failed.smaller() if divisible else None
    if smaller is None:
        less = "" if divisible else "lower train.arguments.per_device_train_batch_size (the loss compares its rows), "
        raise OutOfMemory(
            f"train: out of memory with {failed}; {less}set train.arguments.activation_checkpointing: true, or lower "
            "train.sequence_length"
        )
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f"{NAME}.{os.getpid()}"
    beside.write_text(json.dumps({"size": smaller.size, "accumulation": smaller.accumulation}), encoding="utf-8")
    beside.rename(folder / NAME)
    return smaller


def release() -> None:
    """Give back what a failed attempt held, once nothing names it any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
