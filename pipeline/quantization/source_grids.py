"""The grids that a quantized source stored: its modules' codes, scales and zero points, read one module at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pipeline.catalog import format_to
from pipeline.checkpoint import Checkpoint
from pipeline.dense_shapes import dense_shape
from pipeline.formats import awq, compressed_tensors, gptq
from pipeline.formats.rounded import Rounded
from pipeline.quantization.copies import check_noted
from pipeline.quantization.folder import Order
from pipeline.quantization.survival import Survival, survival
from pipeline.shards import DTYPES, ShardReader, TensorGroup

UNPACK = {"gptq": gptq.unpack, "awq": awq.unpack, "compressed-tensors": compressed_tensors.unpack}


class SourceGrids:
    """The packed modules of an order's source, where it has one in the target's own layout.

    Whose weight was divided after it was dequantized is none of them: its codes stand for another one.
    """

    def __init__(self, order: Order, parent: Checkpoint) -> None:
        self._parent, self._unpack = parent, UNPACK[order.target.format]
        self._survival: dict[str, Survival] = {}
        self.modules: Mapping[str, tuple[str, ...]] = {}
        if order.grid_of is None:
            return
        self._donor, row = order.grid_of, format_to(order.target)
        self._source = Checkpoint.open(self._donor.folder)
        self._reader = ShardReader(self._source)
        self.modules = {
            module: parts
            for module, parts in row.packed_modules(self._source.tensors).items()
            if (name := f"{module}.weight") in self._donor.made_from
            and name in parent.tensors
            and parent.tensors[name].shape == dense_shape(self._source, row, module)
        }

    def read(self, module: str, weight: Tensor) -> Rounded | None:
        """A module's codes on its stored grid, and keep for `survivors` what became of them in float32 `weight` [O, I].

        Raise ReloadMismatch where the source has changed since it was dequantized.
        """
        if module not in self.modules:
            return None
        parts = self.modules[module]
        check_noted(self._donor, self._source, {module: parts})
        tensors = {part.lstrip("."): self._reader[module + part].to(weight.device) for part in parts}
        group = TensorGroup(module=module, dense_name=f"{module}.weight", tensors=tensors, packed=True)
        assert self._source.quantization is not None
        found = self._unpack(group, self._source.quantization)
        became = survival(weight, found, DTYPES[self._parent.tensors[f"{module}.weight"].dtype])
        if became.change_in_steps:
            self._survival[module] = became
        return found

    def survivors(self) -> Mapping[str, Survival]:
        """What became of the changed modules that were read since this was last asked."""
        found, self._survival = self._survival, {}
        return found
