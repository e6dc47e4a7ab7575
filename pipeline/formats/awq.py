"""AWQ, in the GEMM layout.

On disk (gptqmodel, quantization/awq/utils/packing_utils.py; AutoAWQ wrote the same), I in and O out features, 4 bits, G
groups of I / group size inputs:

- `qweight`: int32 [I, O / 8]; nibble k of word j is output 8 j + (0, 2, 4, 6, 1, 3, 5, 7)[k].
- `qzeros`: int32 [G, O / 8], laid alike, stored as they are.
- `scales`: float16 [G, O].

W = (code - zero) * scale. The activation scales that the algorithm searches for are already folded into the layer
before, so these weights belong to this checkpoint's norms, never to the original's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import UnsupportedFormat
from pipeline.formats.components import ALL, FLOATS, WORDS, grid_of, require, require_finite
from pipeline.formats.rounded import Rounded
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

BITS = (4,)
# AutoAWQ names kernels here too: exllama and ipex read GEMM's tensors and rearrange them after loading
# (modules/linear/exllama.py, gemm_ipex.py); marlin's (marlin.py) lie otherwise.
KERNELS = ("gemm", "exllama", "ipex")
# Where output c of each eight lies: the inverse of the order above, in bits.
SHIFTS = tuple(4 * nibble for nibble in (0, 4, 1, 5, 2, 6, 3, 7))


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:
    """[O, I], from qweight's shape, checked against those of qzeros and scales."""
    _check_version(quantization)
    inputs, words = require(group, "qweight", dtypes=WORDS, shape=(-1, -1)).shape
    groups = groups_of(group, quantization, inputs)
    require(group, "qzeros", dtypes=WORDS, shape=(groups, words))
    require(group, "scales", dtypes=FLOATS, shape=(groups, 8 * words))
    return 8 * words, inputs


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
    """float32 [R, I]: (code - zero) * scale, exact; gptqmodel rounds the same products to the scales' dtype."""
    outputs, inputs = dense_shape(group, quantization)
    first, last, _ = rows.indices(outputs)
    words = slice(first // 8, last // 8)
    scales = require_finite(group, "scales", group.tensors["scales"][:, first:last].float()).T.contiguous()
    zeros = _unpack(group.tensors["qzeros"][:, words]).float()
    out = _unpack(group.tensors["qweight"][:, words]).float()
    out.view(last - first, -1, inputs // scales.shape[1]).sub_(zeros[:, :, None]).mul_(scales[:, :, None])
    return out


def pack(rounded: Rounded) -> dict[str, Tensor]:
    """`qweight`, `qzeros` and `scales` of a weight of 4 bits, O a multiple of 8, in groups that follow one another."""
    assert rounded.bits in BITS
    _, inputs = rounded.codes.shape
    size = inputs // rounded.scales.shape[1]
    assert torch.equal(rounded.groups, torch.arange(inputs, device=rounded.groups.device) // size), "AWQ has no g_idx"
    return {
        "qweight": _pack(rounded.codes),
        "qzeros": _pack(rounded.zeros),
        "scales": rounded.scales.half().T.contiguous(),
    }


def unpack(group: TensorGroup, quantization: Quantization) -> Rounded:
    """The codes of a module on their grid, whose scales are float16: what `pack` packed."""
    _, inputs = dense_shape(group, quantization)
    scales = require_finite(group, "scales", require(group, "scales", dtypes=(torch.float16,)))
    size = inputs // len(scales)
    return Rounded(
        bits=BITS[0],
        codes=_unpack(group.tensors["qweight"]).to(torch.uint8),
        scales=scales.T.contiguous(),
        zeros=_unpack(group.tensors["qzeros"]).to(torch.uint8),
        groups=torch.arange(inputs, dtype=torch.int32, device=scales.device) // size,
    )


def groups_of(group: TensorGroup, quantization: Quantization, inputs: int) -> int:
    """Groups in a row of `inputs` weights, in each of AWQ's layouts; raise UnsupportedFormat unless all are full."""
    grid = grid_of(group, quantization, bits=BITS)
    if not inputs or (grid.group_size != -1 and inputs % grid.group_size):
        raise UnsupportedFormat(
            f"{group.module}: group size {grid.group_size} does not divide its {inputs} inputs; "
            "fix group_size in config.json"
        )
    return grid.groups(inputs)


def _pack(codes: Tensor) -> Tensor:
    """uint8 [8 W, R] → int32 [R, W]."""
    words = torch.zeros(len(codes) // 8, codes.shape[1], dtype=torch.int32, device=codes.device)
    for output, shift in enumerate(SHIFTS):
        words.bitwise_or_(codes[output::8].to(torch.int32).bitwise_left_shift_(shift))
    return words.T.contiguous()


def _unpack(words: Tensor) -> Tensor:
    """int32 [R, W] → codes as int32 [8 W, R]."""
    shifts = torch.tensor(SHIFTS, dtype=torch.int32, device=words.device)
    return (words.T.contiguous().unsqueeze(1) >> shifts[:, None]).bitwise_and_(15).flatten(0, 1)


def _check_version(quantization: Quantization) -> None:
    if quantization.layout not in KERNELS:
        raise UnsupportedFormat(f"awq in layout {quantization.layout} cannot be read as GEMM; repack it with gptqmodel")
