"""Rows that share a sequence: which go together, and whether a model keeps them apart."""

from __future__ import annotations

import bisect
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.errors import RecipeError

_ROW = 8  # tokens of a row that a model is tried with
_SEEN = 0.1  # of what a token does to its own row: far more than rounding, far less than what an open mask lets through


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the rows that share a sequence of at most `capacity` tokens, in their order.

    Best fit decreasing: the longest row first, each into the fullest sequence that still has room for it. The same
    lengths give the same answer.
    """
    together: list[list[int]] = []
    by_room: defaultdict[int, deque[int]] = defaultdict(deque)
    rooms: list[int] = []  # those that some sequence has left, ascending
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(rooms, lengths[row])
        if at == len(rooms):
            place, room = len(together), capacity
            together.append([])
        else:
            room = rooms[at]
            place = by_room[room].popleft()
            if not by_room[room]:
                del rooms[at]
        together[place].append(row)
        left = room - lengths[row]
        if not by_room[left]:
            bisect.insort(rooms, left)
        by_room[left].append(place)
    return sorted(sorted(rows) for rows in together)


@torch.inference_mode()
def require_apart(model: Any) -> None:
    """Raise RecipeError unless the model, run on two rows in one sequence, keeps the second from seeing the first.

    Not every architecture heeds `position_ids`, and not every attention does so for more than one sequence at a time
    (flash attention). It is tried on 2 sequences of 16 tokens: the second row must come out the same whatever the
    first one says, measured by what a token of its own changes in it.
    """
    ids = torch.arange(3 * _ROW, device=model.device) * 7 % model.get_input_embeddings().num_embeddings
    first, other, second = ids.reshape(3, _ROW)
    third = torch.cat([other[:1], second[1:]])
    training = model.training
    model.eval()
    try:
        packed = _second(model, first, second)
        seen = (packed - _second(model, other, second))[:, 1:].abs().mean()
        own = (packed - _second(model, first, third))[:, 1:].abs().mean()
    except TypeError as error:  # such as Bloom's, whose attention knows no positions
        raise RecipeError(f"train.packing: {type(model).__name__} takes no position_ids; set it to false") from error
    finally:
        model.train(training)
    if not seen <= _SEEN * own:
        raise RecipeError(
            f"train.packing: {type(model).__name__} lets rows in one sequence see each other; set it to false, or "
            "another attention implementation"
        )


def _second(model: Any, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The second row's logits, float32 [2, row, V], of two equal sequences."""
    ids = torch.cat([first, second]).expand(2, -1)
    positions = torch.arange(_ROW, device=ids.device).repeat(2).expand(2, -1)
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits[:, _ROW:].float()
