"""The formats: one file for each, how it lies on disk and how it is read. `pipeline.catalog` is their table."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from torch import Tensor

from pipeline.catalog import Format
from pipeline.formats.components import ALL
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

# Rows are asked for from a multiple of this many: words, interleaved outputs and blocks of FP8 end there.
ROW_STEP = 128


class Reader(Protocol):
    """What a format's module can do with one packed module's tensors."""

    def dense_shape(self, group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:
        """The shape [O, I] of the whole weight, without touching the codes; raise an InputError if malformed."""

    def dequantize(self, group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
        """`rows` of the weight as float32 [R, I] on the device of its codes.

        The first row is a multiple of ROW_STEP where the weight is a matrix. Raise an InputError or NonFinite if the
        tensors are malformed. What a row is does not depend on which rows are asked for with it.
        """


def load(row: Format) -> Reader:
    """The module that reads a row of the catalog."""
    return cast("Reader", importlib.import_module(row.module))
