"""How far a packed module's kernel may be from float32: one row for each format that is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

MARGIN = 4.0  # times what rounding does to the whole model, as in upcasting.agreement
FLOOR = 1e-5  # of an answer's size: float32 sums in another order
# Of an output's size, by the dtype that is computed in. Measured at most 0.0072 in bfloat16 (NF4, FP4, GPTQ of 2, 3, 4
# and 8 bits, AWQ, int8; 256 to 512 inputs) and 0.0025 in float16 (int8): inputs, weights and outputs are each rounded.
_MOST: Mapping[torch.dtype, float] = {torch.float32: 1e-3, torch.float16: 8e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a format's kernels compute in, whatever the model's own dtype: the coarser of the two counts.

    `times` as much as that explains may a packed module's outputs be off. What kernels round their inputs to
    (`evaluation.rounding`) is done to what they are compared with.
    """

    kernel: torch.dtype
    times: float = 1

    def computes(self, dtype: torch.dtype) -> torch.dtype:
        """What the packed modules of a model of `dtype` are computed in."""
        return max(self.kernel, dtype, key=lambda one: torch.finfo(one).eps)

    def of(self, dtype: torch.dtype) -> float:
        """The most that an output of a packed module of a model of `dtype` may be off, as a share of its size."""
        return self.times * _MOST[self.computes(dtype)]


# By the catalog's name of the format.
BOUNDS: Mapping[str, Bound] = {
    "bnb-4bit": Bound(kernel=torch.bfloat16),  # bnb_4bit_compute_dtype, as it is written
    "bnb-int8": Bound(kernel=torch.float16),  # what is not rounded to int8, and the scales
    # gptqmodel's kernel of four bits on a CPU (torch's _weight_int4pack_mm) computes in bfloat16 for every model.
    "gptq": Bound(kernel=torch.bfloat16),
    "awq": Bound(kernel=torch.bfloat16),
    # Computes in the model's dtype, the scales of its inputs too: an input may land on the next code. fp8 was off by
    # 0.034 in bfloat16 and 0.011 in float16, by nothing in float32.
    "compressed-tensors": Bound(kernel=torch.float32, times=3),
    "gguf": Bound(kernel=torch.float32),  # dequantized when it is loaded
}
