"""Codes of a few bits, laid as one little-endian bit stream in 32-bit words."""

from __future__ import annotations

import math

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


def pack(codes: Tensor, bits: int) -> Tensor:
    """The int32 words [..., ceil(C * bits / 32)] of uint8 `codes` [..., C], each below 2**bits: what `unpack` undoes.

    The last word is filled up with zeros; where `bits` does not divide 32, C is a multiple of 32.
    """
    if WORD % bits == 0:
        codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % (WORD // bits)))
    fields = 8 // math.gcd(bits, 8)  # codes that fill whole bytes together; no code lies in more than two
    runs = codes.reshape(*codes.shape[:-1], -1, fields)
    # By the byte: a word's lowest comes first in memory, and a shift drops what goes into the next.
    stored = torch.zeros(*runs.shape[:-1], fields * bits // 8, dtype=torch.uint8, device=codes.device)
    for i, code in enumerate(runs.unbind(-1)):
        byte, shift = divmod(i * bits, 8)
        stored[..., byte] |= code << shift
        if shift + bits > 8:  # noqa: PLR2004 - a byte
            stored[..., byte + 1] |= code >> (8 - shift)
    return stored.flatten(-2).view(torch.int32)


def unpack_floats(words: Tensor, bits: int, out: Tensor) -> None:
    """Write the codes of int32 `words` [R, W] into `out`, contiguous float32 [R, W * 32 // bits].

    All go by the byte, several times as fast as by words; a word's lowest byte comes first in memory.
    """
    # Flat first: with a side of one, a contiguous tensor may have any stride, and such cannot be viewed as bytes.
    stored = words.flatten().view(torch.uint8)
    every = torch.arange(256, device=words.device)
    match bits:
        case 8:
            out.view(-1).copy_(stored)
        case 4:
            look_up(nibble_pairs(words.device), stored, out.view(-1))
        case 2:
            table = torch.stack([every >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).float()
            # Four floats move as one complex number of two doubles.
            flat, codes = out.view(-1).view(torch.complex128), table.view(torch.complex128).flatten()
            torch.index_select(codes, 0, stored.int(), out=flat)
        case _:
            _straddling_floats(stored, bits, out)


def _straddling_floats(stored: Tensor, bits: int, out: Tensor) -> None:
    """Write the codes of uint8 `stored` into `out`: 8 of them share `bits` bytes, and no code more than two."""
    octets = out.view(-1, 8)
    columns = stored.view(-1, bits).T.contiguous().to(torch.int16)
    for code in range(8):
        byte, shift = divmod(code * bits, 8)
        value = columns[byte] >> shift
        if shift + bits > 8:  # noqa: PLR2004 - a byte
            value.bitwise_or_(columns[byte + 1] << (8 - shift))
        octets[:, code] = value.bitwise_and_((1 << bits) - 1)


def nibble_pairs(device: torch.device) -> Tensor:
    """What each byte holds, low nibble first, as float32 [256, 2]."""
    every = torch.arange(256, device=device)
    return torch.stack((every & 15, every >> 4), dim=1).float()


def look_up(pairs: Tensor, indices: Tensor, out: Tensor) -> None:
    """Write row `indices[i]` of `pairs`, float32 [256, 2], to places 2 i and 2 i + 1 of `out`, float32 [2 N].

    Both floats move as one int64: half the lookups.
    """
    torch.index_select(pairs.view(torch.int64).flatten(), 0, indices.int(), out=out.view(torch.int64))
