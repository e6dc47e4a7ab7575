"""The tensors of GGUF files, memory-mapped: nothing is read until it is used, and nothing is copied."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Self

import torch

from pipeline.checkpoint import Checkpoint, inside
from pipeline.gguf_headers import BLOCKS, DENSE_TYPES
from pipeline.shards import DTYPES, TensorGroup


class GGUFReader:
    """Tensor groups of a GGUF checkpoint; a context manager, whose tensors must not outlive a change of the files.

    A dense tensor (F32, F16, BF16 and the like) is a group with one component of that dtype. A quantized tensor is a
    packed group with one component called by its ggml type, such as `Q4_K`: uint8 [..., row bytes].
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()

    def groups(self) -> Iterator[TensorGroup]:
        """Every tensor of the files exactly once, in file order, under its GGUF name."""
        for name in self._checkpoint.tensors:
            yield self.group(name)

    def group(self, name: str) -> TensorGroup:
        """The tensor called `name` as a group."""
        info = self._checkpoint.tensors[name]
        raw = self._file(self._checkpoint.weight_map[name])[info.start : info.end]
        module, _, last = name.rpartition(".")
        if info.dtype in DENSE_TYPES:
            tensors = {last: raw.view(DTYPES[info.dtype]).reshape(info.shape)}
            return TensorGroup(module=module, dense_name=name, tensors=tensors, packed=False)
        weights, size = BLOCKS[info.dtype]
        row = info.shape[-1] // weights * size
        packed = {info.dtype: raw.reshape(*info.shape[:-1], row)}
        return TensorGroup(module=module, dense_name=name, tensors=packed, packed=True)

    def _file(self, shard: str) -> torch.Tensor:
        if shard not in self._files:
            path = inside(self._checkpoint.folder, shard)
            # A private mapping: pages are read when they are looked at, and never written.
            self._files[shard] = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
        return self._files[shard]
