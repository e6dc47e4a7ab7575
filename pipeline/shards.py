"""Tensor groups out of shards. Reading is lazy: a tensor is mapped when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from pipeline.catalog import Format
from pipeline.checkpoint import Checkpoint, inside
from pipeline.errors import CorruptShard

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorGroup:
    """One module's tensors, wherever their shards are.

    `tensors` maps a component (`qweight`, `weight.absmax`, …) to its tensor, loaded when asked for; a dense group has
    one, named after its own last part (`weight`, `bias`, …). `packed` says whether the group needs dequantizing, into
    the tensor `dense_name`.
    """

    module: str
    dense_name: str
    tensors: Mapping[str, torch.Tensor]
    packed: bool


class ShardReader:
    """Tensors of a checkpoint by name, memory-mapped; a context manager."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._open: dict[str, Any] = {}  # safetensors' handles are untyped

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor called `name`; raise CorruptShard where safetensors itself will not have it."""
        shard = self._checkpoint.weight_map[name]
        try:
            if shard not in self._open:
                path = inside(self._checkpoint.path, shard)
                self._open[shard] = safe_open(path, framework="pt", device="cpu")
            tensor: torch.Tensor = self._open[shard].get_tensor(name)
        except (SafetensorError, AttributeError) as error:  # the latter for a dtype that torch does not have
            raise CorruptShard(f"{shard}: {name} cannot be read ({error}); download the file again") from error
        return tensor

    def groups(self, row: Format) -> Iterator[TensorGroup]:
        """Every tensor of the checkpoint exactly once, packed modules together, in file order."""
        packed = row.packed_modules(self._checkpoint.tensors)
        member = {module + part: module for module, parts in packed.items() for part in parts}
        done: set[str] = set()
        for name in self._checkpoint.tensors:
            module = member.get(name)
            if module is None:
                prefix, _, last = name.rpartition(".")
                yield TensorGroup(module=prefix, dense_name=name, tensors=_Lazy(self, {last: name}), packed=False)
            elif module not in done:
                done.add(module)
                names = {part.lstrip("._"): module + part for part in packed[module]}
                dense_name = row.dense_name(module, packed[module])
                yield TensorGroup(module=module, dense_name=dense_name, tensors=_Lazy(self, names), packed=True)


class _Lazy(Mapping[str, torch.Tensor]):
    """Component → tensor, read at each access."""

    def __init__(self, reader: ShardReader, names: Mapping[str, str]) -> None:
        self._reader, self._names = reader, names

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._reader[self._names[key]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
