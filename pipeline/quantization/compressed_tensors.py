"""compressed-tensors' schemes: integers by GPTQ's rounding or to nearest, float8 to nearest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint import Checkpoint
from pipeline.errors import about
from pipeline.formats.compressed_tensors import dequantize
from pipeline.formats.compressed_tensors_pack import config_of, pack, pack_floats, scheme_of
from pipeline.quantization.calibration import Passed
from pipeline.quantization.folder import Order
from pipeline.quantization.grid_choice import on_symmetric_grid
from pipeline.quantization.heads import left_dense
from pipeline.quantization.layouts import Layout
from pipeline.quantization.rounders import Integers, module_of, weight_of
from pipeline.quantization.streamed import Streamed, linears_of
from pipeline.quantization.survival import Survival
from pipeline.quantization_config import Quantization
from pipeline.shards import DTYPES
from pipeline.targets import CompressedTensorsTarget


class SymmetricIntegers(Integers):
    """w4a16 and w8a8, scales in the dtype of the weight: what vLLM and transformers make room for."""

    def __init__(self, order: Order, parent: Checkpoint, streamed: Streamed) -> None:
        assert isinstance(order.target, CompressedTensorsTarget)
        layout = Layout(
            pack=partial(pack, scheme=scheme_of(order.target)), dequantize=dequantize,
            quantization=Quantization.parse(config_of(order.target, ())),
        )  # fmt: skip
        super().__init__(
            order, parent, streamed, target=on_symmetric_grid(order.target), layout=layout,
            dtype_of=partial(_dtype_of, parent),
        )  # fmt: skip
        self._parent = parent

    def config(self, packed: Collection[str]) -> dict[str, Any]:
        """As the library writes it."""
        return _config(self._order, self._parent, packed)


class Floats:
    """fp8: each weight by itself, on the scale of its output."""

    def __init__(self, order: Order, parent: Checkpoint, streamed: Streamed) -> None:
        assert isinstance(order.target, CompressedTensorsTarget)
        self._order, self._parent, self._streamed = order, parent, streamed
        self._scheme = scheme_of(order.target)

    def __call__(self, passed: Passed) -> Mapping[str, Tensor]:
        """The weight and weight_scale of each linear module."""
        found: dict[str, Tensor] = {}
        for name in linears_of(passed.module):
            module = module_of(self._streamed, passed, name)
            if module in self._order.kept:
                continue
            with about(f"{passed.name}.{name}"):
                parts = pack_floats(weight_of(passed, name), self._scheme, dtype=_dtype_of(self._parent, module))
            found |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        return found

    def replace(self, passed: Passed) -> None:
        """No rows are calibrated on."""
        raise AssertionError(passed.name)

    def survivors(self) -> Mapping[str, Survival]:
        """A float has no grid that training could be rounded away on."""
        return {}

    def config(self, packed: Collection[str]) -> dict[str, Any]:
        """As the library writes it."""
        return _config(self._order, self._parent, packed)


def _dtype_of(parent: Checkpoint, module: str) -> torch.dtype:
    return DTYPES[parent.tensors[f"{module}.weight"].dtype]


def _config(order: Order, parent: Checkpoint, packed: Collection[str]) -> dict[str, Any]:
    """The scheme for every linear module that is packed; all others are named, and stay dense."""
    assert isinstance(order.target, CompressedTensorsTarget)
    return config_of(order.target, left_dense(parent, packed, trust_remote_code=order.trust_remote_code))
