"""bitsandbytes int8 (LLM.int8), row-major.

On disk (bitsandbytes, nn/modules.py `Linear8bitLt._save_to_state_dict`): `weight` int8 [O, I]; `SCB` float32 [O], the
largest magnitude of each row; `weight_format` uint8 scalar, 0 for row-major, the only order that
bitsandbytes still writes and loads.
W = weight * SCB / 127 (functional.py `int8_vectorwise_dequant`).
Written, a weight is rounded to float16 first (nn/modules.py `Int8Params`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import NonFinite, UnsupportedFormat
from pipeline.formats.components import ALL, FLOATS, NOT_FINITE, all_finite, require, require_finite
from pipeline.formats.shares import TILE, share_out
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

_LARGEST = 127  # the code of a row's largest magnitude


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:  # noqa: ARG001 - the protocol's
    """The codes' own shape; raise UnsupportedFormat for tiles of another order."""
    if "weight_format" in group.tensors:
        order = int(require(group, "weight_format", dtypes=(torch.uint8,), shape=()))
        if order != 0:
            raise UnsupportedFormat(
                f"{group.module}: weight_format is {order}, only 0 (row-major) can be read; save it again with a newer "
                "bitsandbytes"
            )
    return tuple(require(group, "weight", dtypes=(torch.int8,), shape=(-1, -1)).shape)


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
    """float32 [R, I]: code * SCB of its row * (1 / 127), rounded in this order as bitsandbytes does."""
    shape = dense_shape(group, quantization)
    scales = require(group, "SCB", dtypes=FLOATS, shape=shape[:1])[rows].float()
    require_finite(group, "SCB", scales)
    return group.tensors["weight"][rows].float().mul_(scales[:, None]).mul_(1 / 127)


def pack(weight: Tensor) -> dict[str, Tensor]:
    """The components of `weight` [O, I] in bfloat16, float16 or float32, bit for bit as bitsandbytes 0.50 gives them.

    Raise NonFinite, without the tensor's name, where a weight is NaN, infinite or too large for float16. Source:
    backends/default/ops.py `int8_vectorwise_quant`.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), device=weight.device)
    step = max(1, TILE // max(1, weight.shape[1]))

    def work(start: int, stop: int) -> None:
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            values = weight[rows].to(torch.float16).float()
            largest = torch.amax(values.abs(), 1, out=scales[rows])
            # A row of zeros keeps the codes that 0 / 0 becomes there: zeros.
            steps = (_LARGEST / largest).masked_fill_(largest == 0, 0.0)
            codes[rows] = values.mul_(steps[:, None]).round_()

    share_out(work, count=len(weight), step=step)
    if not all_finite(scales):
        raise NonFinite(_TOO_LARGE if all_finite(weight) else NOT_FINITE)
    return {"SCB": scales, "weight": codes, "weight_format": torch.zeros((), dtype=torch.uint8)}


def shapes(shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Component → its dtype and shape, as `pack` will give them for a weight of `shape` [O, I]."""
    return {"SCB": (torch.float32, shape[:1]), "weight": (torch.int8, shape), "weight_format": (torch.uint8, ())}


_TOO_LARGE = "holds values too large for float16, which int8 is made from; quantize to 4 bits"
