"""The header of a safetensors file, read and checked without torch.

Layout (safetensors' own format page): 8 bytes little-endian header length, a JSON object {name: {dtype, shape,
data_offsets}}, then the bytes. Offsets count from the end of the header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CorruptShard

ITEM_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
MAX_HEADER = 32 << 20  # bytes: room for a quarter of a million tensors; the largest shards on the hub need 2 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies: `start` and `end` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in file order; raise CorruptShard unless they fill the file exactly."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:  # noqa: PLR2004 - the length itself takes eight bytes
                raise CorruptShard(
                    f"{path.name}: says its header has {length} bytes, but the file has {size}; {_AGAIN}"
                )
            if length > MAX_HEADER:
                raise CorruptShard(
                    f"{path.name}: has a header of {length / 1e6:.0f} MB, more than any model needs; save it in shards"
                )
            raw = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptShard(f"{path.name}: its header cannot be read ({error}); {_AGAIN}") from error
    if not isinstance(raw, dict):
        raise CorruptShard(f"{path.name}: its header is no JSON object; {_AGAIN}")
    raw.pop("__metadata__", None)
    start = 8 + length
    tensors = sorted(
        ((name, _info(path, name, entry, start)) for name, entry in raw.items()), key=lambda x: (x[1].start, x[1].end)
    )
    position = start
    for name, info in tensors:
        if info.start != position:
            raise CorruptShard(f"{path.name}: {name} starts at byte {info.start}, expected {position}; {_AGAIN}")
        position = info.end
    if position != size:
        raise CorruptShard(f"{path.name}: has {size} bytes, its header accounts for {position}; {_AGAIN}")
    return dict(tensors)


def read_metadata(path: Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file that `read_header` has let pass: texts, by convention of the writer."""
    with path.open("rb") as file:
        raw = json.loads(file.read(int.from_bytes(file.read(8), "little"))).get("__metadata__")
    return {str(key): str(value) for key, value in raw.items()} if isinstance(raw, dict) else {}


def pack_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The header bytes for tensors laid one after another, and each tensor's byte position in the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * ITEM_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # data starts on an 8-byte boundary
    start = 8 + len(raw)
    positions = {name: start + entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"}
    return len(raw).to_bytes(8, "little") + raw, positions


_AGAIN = "the file is damaged, download it again"


def _info(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        size = math.prod(shape) * ITEM_BITS[dtype]
        valid = all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)) and (end - start) * 8 == size
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise CorruptShard(f"{path.name}: {name} has an unreadable entry ({error!r}); {_AGAIN}") from error
    if not valid:
        raise CorruptShard(f"{path.name}: {name} does not span the bytes of its shape {list(shape)} {dtype}; {_AGAIN}")
    return TensorInfo(dtype=dtype, shape=shape, start=base + start, end=base + end)
