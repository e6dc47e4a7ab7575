"""What the processes of one training know of each other; a training in a single process is its own main one."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from accelerate import PartialState
from torch import distributed


def count() -> int:
    """The processes that train together."""
    return distributed.get_world_size() if _together() else 1


def is_main() -> bool:
    """Whether this is the process that writes; known from the launcher's RANK before the processes have met."""
    return distributed.get_rank() == 0 if _together() else int(os.environ.get("RANK", "0")) == 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if _together():
        PartialState().wait_for_everyone()


def from_main(number: int) -> int:
    """The main process's number, in every process."""
    if not _together():
        return number
    value = torch.tensor([number], dtype=torch.int64, device=PartialState().device)
    distributed.broadcast(value, src=0)
    return int(value.item())


def anywhere(flags: Sequence[bool]) -> list[bool]:
    """Each flag, set where it is set in any process; all processes give equally many."""
    if not _together() or not flags:
        return list(flags)
    value = torch.tensor(flags, dtype=torch.int32, device=PartialState().device)
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return [bool(flag) for flag in value.tolist()]


def _together() -> bool:
    return distributed.is_available() and distributed.is_initialized()
