"""Tensor groups in, shards out.

Reading is lazy: a tensor is mapped when it is asked for. Writing is preallocated: the shapes are known before the
first byte, so every tensor goes straight to its place and memory is bounded by the largest one.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open

from pipeline.catalog import Format
from pipeline.checkpoint import INDEX, SINGLE, Checkpoint, inside
from pipeline.errors import NoSpace
from pipeline.headers import ITEM_BITS, pack_header

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_SHARD_BYTES = 5 * 10**9  # the hub's own default


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
        """The tensor called `name`."""
        shard = self._checkpoint.weight_map[name]
        if shard not in self._open:
            path = inside(self._checkpoint.path, shard)
            self._open[shard] = safe_open(path, framework="pt", device="cpu")
        tensor: torch.Tensor = self._open[shard].get_tensor(name)
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
                tensors = _Lazy(self, names)
                yield TensorGroup(module=module, dense_name=module + row.weight, tensors=tensors, packed=True)


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


class ShardWriter:
    """Writes tensors of known shapes into one file, or several with an index; a context manager.

    Leaving the block without an error checks that every tensor was written once, syncs, and writes the index.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]], *, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._folder = folder
        self._shapes = shapes
        self._pending = set(shapes)
        self._places: dict[str, tuple[int, int]] = {}
        self._files: list[int] = []
        shards = _split(shapes, max_shard_bytes)
        self._names = [SINGLE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
        self.weight_map = {name: self._names[i] for i, shard in enumerate(shards) for name in shard}
        self._shards = shards

    def __enter__(self) -> Self:
        try:
            for name, shard in zip(self._names, self._shards, strict=True):
                self._create(name, shard)
        except OSError as error:
            for file in self._files:
                os.close(file)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            total = sum(_nbytes(*shape) for shape in self._shapes.values())
            raise NoSpace(
                f"{self._folder}: cannot hold the {total / 1e9:.2f} GB that are to be written; free space or choose "
                "another store"
            ) from error
        return self

    def _create(self, name: str, shard: list[str]) -> None:
        header, positions = pack_header({tensor: self._shapes[tensor] for tensor in shard})
        file = os.open(self._folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self._files.append(file)
        # A full disk says so here, not halfway.
        os.posix_fallocate(file, 0, len(header) + sum(_nbytes(*self._shapes[tensor]) for tensor in shard))
        _write_all(file, memoryview(header), 0)
        self._places |= {tensor: (file, position) for tensor, position in positions.items()}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put `tensor` in its place; its dtype and shape must be those announced."""
        dtype, shape = self._shapes[name]
        assert name in self._pending, f"{name} is written twice"
        assert (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) == (dtype, tuple(shape)), f"{name}: {tensor.shape}"
        file, position = self._places[name]
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        _write_all(file, raw.numpy().data, position)
        self._pending.discard(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            if kind is None:
                os.fsync(file)
            os.close(file)
        if kind is None:
            assert not self._pending, f"never written: {sorted(self._pending)[:3]}"
            if len(self._names) > 1:
                total = sum(_nbytes(*shape) for shape in self._shapes.values())
                index = {"metadata": {"total_size": total}, "weight_map": self.weight_map}
                (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(shapes: Mapping[str, tuple[str, tuple[int, ...]]], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = _nbytes(*shape)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel()) * ITEM_BITS[dtype] // 8


def _shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _write_all(file: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(file, data, position)
        data, position = data[written:], position + written
