"""AWQ, in the GEMV fast layout of AutoAWQ and llm-awq.

On disk (AutoAWQ 0.2.9, modules/linear/gemv_fast.py `pack_intweight`; gptqmodel, nn_modules/qlinear/gemv_fast_awq.py
`LLMAwqLinear`, hands llm-awq's tensors to the same kernels), I in and O out features, 4 bits, G groups of I / group
size inputs, P >= G rows, rounded up to whole steps of its kernel:

- `qweight`: int16 [O / 4, I]. Row n is one stream of nibbles over (I / 64, 4, 2, 4, 2, 4): block of 64 inputs, output
  4 n + r, half h of the block, then b, e and d of input 32 h + 8 d + 2 b + e.
- `scales`: float16 [P, O].
- `qzeros` (llm-awq: `scaled_zeros`): float16 [P, O], minus zero * scale.

The first G rows count, the others are padding. W = code * scale + scaled zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import CheckpointError
from pipeline.formats.awq import groups_of
from pipeline.formats.awq_gemv import require_room
from pipeline.formats.components import ALL, FLOATS, require, require_finite
from pipeline.formats.words import look_up, nibble_pairs
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

BLOCK = 64  # inputs that lie together
ROWS = 4  # outputs that share a row of qweight


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:
    """[O, I], from qweight's shape, checked against those of scales and zeros."""
    quarter, inputs = require(group, "qweight", dtypes=(torch.int16,), shape=(-1, -1)).shape
    if inputs % BLOCK:
        raise CheckpointError(
            f"{group.module}: qweight has {inputs} columns, expected a multiple of {BLOCK}; "
            "download the checkpoint again"
        )
    groups = groups_of(group, quantization, inputs)
    room = require(group, "scales", dtypes=FLOATS, shape=(-1, ROWS * quarter)).shape[0]
    require(group, _zeros(group), dtypes=FLOATS, shape=(room, ROWS * quarter))
    require_room(group, "scales", room=room, groups=groups)
    return ROWS * quarter, inputs


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
    """float32 [R, I]: code * scale + scaled zero; the kernels round the same to float16."""
    outputs, inputs = dense_shape(group, quantization)
    groups = groups_of(group, quantization, inputs)
    first, last, _ = rows.indices(outputs)
    scales, zeros = (
        require_finite(group, name, group.tensors[name][:groups, first:last].float()).T.contiguous()
        for name in ("scales", _zeros(group))
    )
    stored = group.tensors["qweight"][first // ROWS : last // ROWS].contiguous().view(torch.int64)
    # [n, I / 64, r, 4 words of 16 nibbles]: the four outputs come apart
    words = stored.view(-1, inputs // BLOCK, ROWS, 4).transpose(1, 2).contiguous()
    _in_order(words)
    out = torch.empty(last - first, inputs, dtype=torch.float32, device=words.device)
    look_up(nibble_pairs(words.device), words.view(torch.uint8).flatten(), out.view(-1))
    out.view(last - first, groups, -1).mul_(scales[:, :, None]).add_(zeros[:, :, None])
    return out


def _in_order(words: Tensor) -> None:
    """Bring the nibbles of int64 `words` [..., 4] from (h, b, e, d) to (h, d, b, e), in place.

    Four exchanges of what lies `distance` bits apart, on whole words: moving single bytes takes ten times as long.
    """
    _exchange(words, 8, 0x0000FF000000FF00)  # (h, b, e, d) → (h, b, d1, e, d0), d = 2 d1 + d0
    _exchange(words, 4, 0x00F000F000F000F0)  # → (h, b, d, e): each byte is a pair of inputs
    low, high = words[..., 0::2], words[..., 1::2]  # b is 0 or 1, 2 or 3
    moved = (low >> 16).bitwise_xor_(high).bitwise_and_(0x0000FFFF0000FFFF)
    high.bitwise_xor_(moved)
    low.bitwise_xor_(moved << 16)
    _exchange(words, 24, 0x00000000FF00FF00)


def _exchange(words: Tensor, distance: int, places: int) -> None:
    """Exchange the bits at `places` with those `distance` above them, in place."""
    moved = (words >> distance).bitwise_xor_(words).bitwise_and_(places)
    words.bitwise_xor_(moved)
    words.bitwise_xor_(moved << distance)


def _zeros(group: TensorGroup) -> str:
    return "scaled_zeros" if "scaled_zeros" in group.tensors else "qzeros"
