"""Quantization-aware training: every linear weight is rounded to the target's grid in the forward pass.

torchao's fake quantization does the rounding, with a straight-through gradient; the weights that train stay float32 and
are written as they are, to be quantized by the quantize stage. Source: torchao 0.18 `quantization/qat`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from pipeline.errors import RecipeError


def prepare(model: Any, grid: Mapping[str, Any], *, dense: Collection[str]) -> None:
    """Have every linear layer but the output head and those called `dense` compute with weights rounded to `grid`.

    `grid` is a gptq or awq target: bits, group_size, symmetric. Raise RecipeError where torchao has no such grid, or a
    layer's inputs are no multiple of the group size.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    from torchao.quantization.quant_primitives import ZeroPointDomain

    bits, group = int(grid["bits"]), int(grid["group_size"])
    symmetric = bool(grid.get("symmetric", False))  # AWQ has zero points
    head = model.get_output_embeddings()
    try:
        shape: dict[str, Any] = {"granularity": "per_channel"} if group == -1 else {"group_size": group}
        if not symmetric:
            # torchao 0.18 makes floating zero points whatever it is told, and by default reads them as integers, which
            # cuts off whatever lies on one side. Unsigned codes and floating zero points are what it means.
            shape |= {"zero_point_domain": ZeroPointDomain.FLOAT, "zero_point_precision": torch.float32}
        config = IntxFakeQuantizeConfig(
            getattr(torch, f"{'int' if symmetric else 'uint'}{bits}"), is_symmetric=symmetric, **shape
        )
        quantize_(
            model,
            QATConfig(weight_config=config, step="prepare"),
            filter_fn=lambda module, name: (
                isinstance(module, torch.nn.Linear) and module is not head and name not in dense
            ),
        )
    except (ValueError, TypeError, AttributeError, AssertionError) as error:
        said = " ".join(str(error).split())[:200]
        raise RecipeError(f"train.method qat: torchao has no fake quantization for {bits} bits ({said})") from error
