"""Codes of a few bits, laid as one little-endian bit stream in 32-bit words."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def unpack(words: Tensor, bits: int) -> Tensor:
    """The codes of int32 `words` [..., W] as int32 [..., W * 32 // bits], each 0 .. 2**bits - 1.

    Code i lies in bits `bits * i` and up of the stream, bit 0 being the lowest of word 0. Where `bits` does not
    divide 32 (3 bits: codes 10 and 21 of each 32 straddle two words) W is a multiple of `bits`.
    """
    mask = (1 << bits) - 1
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
        # >> carries the sign down, which the mask takes off again
        return (words.unsqueeze(-1) >> shifts).bitwise_and_(mask).flatten(-2)
    start = torch.arange(WORD, device=words.device) * bits  # of each of the 32 codes in `bits` words
    block = words.reshape(*words.shape[:-1], -1, bits).long() & 0xFFFFFFFF
    following = block.roll(-1, dims=-1)  # the last word's last code ends with it: what wraps around is masked off
    pairs = block | following << WORD
    codes = pairs[..., start // WORD] >> start % WORD
    return codes.bitwise_and_(mask).to(torch.int32).flatten(-2)


def unpack_floats(words: Tensor, bits: int, out: Tensor) -> None:
    """Write the codes of int32 `words` [R, W] into `out`, contiguous float32 [R, W * 32 // bits].

    4 and 8 bits go by the byte, several times as fast as by shifts; a word's lowest byte comes first in memory.
    """
    if bits == 8:  # noqa: PLR2004 - a byte
        out.copy_(words.view(torch.uint8))
    elif bits == 4:  # noqa: PLR2004 - half a byte
        look_up(nibble_pairs(words.device), words.view(torch.uint8).flatten(), out.view(-1))
    else:
        out.copy_(unpack(words, bits))


def nibble_pairs(device: torch.device) -> Tensor:
    """What each byte holds, low nibble first, as float32 [256, 2]."""
    every = torch.arange(256, device=device)
    return torch.stack((every & 15, every >> 4), dim=1).float()


def look_up(pairs: Tensor, indices: Tensor, out: Tensor) -> None:
    """Write row `indices[i]` of `pairs`, float32 [256, 2], to places 2 i and 2 i + 1 of `out`, float32 [2 N].

    Both floats move as one int64: half the lookups.
    """
    torch.index_select(pairs.view(torch.int64).flatten(), 0, indices.int(), out=out.view(torch.int64))
