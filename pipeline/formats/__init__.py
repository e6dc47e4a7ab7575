"""The formats: one file for each, how it lies on disk and how it is read. `pipeline.catalog` is their table."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from torch import Tensor

from pipeline.catalog import Format
from pipeline.checkpoint import Quantization
from pipeline.shards import TensorGroup


class Reader(Protocol):
    """What a format's module can do with one packed module's tensors."""

    def dense_shape(self, group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:
        """The shape [O, I] that `dequantize` returns, without touching the codes; raise an InputError if malformed."""

    def dequantize(self, group: TensorGroup, quantization: Quantization) -> Tensor:
        """The weight as float32 [O, I] on the device of its codes; raise an InputError or NonFinite if malformed."""


def load(row: Format) -> Reader:
    """The module that reads a row of the catalog."""
    return cast("Reader", importlib.import_module(row.module))
