"""The header of a GGUF file, read and checked without torch or numpy.

Layout (ggml's docs/gguf.md; versions 2 and 3, little-endian): `GGUF`, uint32 version, uint64 number of tensors, uint64
number of metadata entries; each entry a string key, a uint32 value type and the value; each tensor a string name, a
uint32 number of dimensions, uint64 dimensions (the fastest first), a uint32 ggml type and a uint64 offset. A string is
a uint64 length and UTF-8. The tensors follow from the next multiple of `general.alignment` on, each padded to it.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CorruptShard, UnsupportedFormat
from pipeline.headers import MAX_HEADER, TensorInfo

Scalar = int | float | bool | str

# ggml type id → name, weights in a block, bytes of a block (ggml.h `enum ggml_type`, ggml-common.h). Ids that are
# missing were retired by ggml.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1),
    25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}  # fmt: skip
# Name → weights in a block, bytes of a block.
BLOCKS = {name: (weights, size) for name, weights, size in TYPES.values()}
DENSE_TYPES = frozenset(name for name, (weights, _) in BLOCKS.items() if weights == 1)

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4  # ggml's own limit
_AGAIN = "the file is damaged, download it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a GGUF file says of itself.

    `metadata` has the scalars and strings, `lengths` the number of values in each array; `tensors` are in file order.
    `tables` is the byte position where the metadata ends and the tensors' table begins.
    """

    metadata: Mapping[str, Scalar]
    lengths: Mapping[str, int]
    tensors: Mapping[str, TensorInfo]
    tables: int


def read_gguf_header(path: Path) -> Header:
    """The header of a GGUF file; raise CorruptShard unless its tensors lie in the file one after another."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            if size < 24 or file.read(4) != b"GGUF":  # noqa: PLR2004 - the fixed part, up to the metadata
                raise CorruptShard(f"{path.name}: does not begin as a GGUF file does; {_AGAIN}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path.name, data, size).header()
    except OSError as error:
        raise CorruptShard(f"{path.name}: its header cannot be read ({error}); {_AGAIN}") from error


class _Parser:
    """Walks a header; no position ever passes the end of the file or the largest header."""

    def __init__(self, name: str, data: mmap.mmap, size: int) -> None:
        self._name, self._data, self._size = name, data, size
        self._limit = min(size, MAX_HEADER)
        self._at = 4

    def header(self) -> Header:
        version = int(self._scalar("<I"))
        if version and not version & 0xFFFF:
            raise UnsupportedFormat(
                f"{self._name}: is a big-endian GGUF file, which cannot be read; convert it again as little-endian"
            )
        if version not in _VERSIONS:
            raise UnsupportedFormat(
                f"{self._name}: is GGUF version {version}, which cannot be read, only 2 and 3; convert the model again"
            )
        count, entries = int(self._scalar("<Q")), int(self._scalar("<Q"))
        # An entry takes 13 bytes at the least, a tensor 24.
        self._room(entries * 13 + count * 24, f"{entries} metadata entries and {count} tensors")
        metadata, lengths = self._metadata(entries)
        tables = self._at
        return Header(metadata=metadata, lengths=lengths, tensors=self._tensors(count, metadata), tables=tables)

    def _metadata(self, entries: int) -> tuple[dict[str, Scalar], dict[str, int]]:
        metadata: dict[str, Scalar] = {}
        lengths: dict[str, int] = {}
        for _ in range(entries):
            key, kind = self._string(), int(self._scalar("<I"))
            if key in metadata or key in lengths:
                raise CorruptShard(f"{self._name}: has the metadata key {_shown(key)} twice; {_AGAIN}")
            if kind == _ARRAY:
                lengths[key] = self._skip_array(key)
            elif kind == _STRING:
                metadata[key] = self._string()
            elif kind in _SCALARS:
                metadata[key] = self._scalar(_SCALARS[kind])
            else:
                raise CorruptShard(f"{self._name}: metadata {_shown(key)} has the unknown value type {kind}; {_AGAIN}")
        return metadata, lengths

    def _skip_array(self, key: str) -> int:
        kind, count = int(self._scalar("<I")), int(self._scalar("<Q"))
        if kind in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[kind]), f"an array of {count} values")
        elif kind == _STRING:
            self._room(count * 8, f"an array of {count} strings")
            length, at, data = struct.Struct("<Q"), self._at, self._data
            for _ in range(count):
                if at > self._limit - 8:
                    break
                at += 8 + length.unpack_from(data, at)[0]
            self._skip(at - self._at, f"an array of {count} strings")
        else:
            raise CorruptShard(f"{self._name}: metadata {_shown(key)} is an array of unknown type {kind}; {_AGAIN}")
        return count

    def _tensors(self, count: int, metadata: Mapping[str, Scalar]) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):  # noqa: PLR2004 - the specification's least alignment
            raise CorruptShard(
                f"{self._name}: has an alignment of {_shown(alignment)} bytes, no power of two; {_AGAIN}"
            )
        entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._string()
            if name in entries:
                raise CorruptShard(f"{self._name}: has the tensor {_shown(name)} twice; {_AGAIN}")
            entries[name] = self._entry(name)
        position = start = _aligned(self._at, alignment)
        tensors: dict[str, TensorInfo] = {}
        for name, (shape, kind, offset) in entries.items():
            info = self._info(name, shape, kind, start + offset)
            if info.start != position:
                raise CorruptShard(
                    f"{self._name}: {_shown(name)} starts at byte {info.start}, expected {position}; {_AGAIN}"
                )
            tensors[name], position = info, _aligned(info.end, alignment)
        return tensors

    def _entry(self, name: str) -> tuple[tuple[int, ...], int, int]:
        dimensions = int(self._scalar("<I"))
        if dimensions > _MAX_DIMENSIONS:
            raise CorruptShard(
                f"{self._name}: {_shown(name)} has {dimensions} dimensions, at most 4 are known; {_AGAIN}"
            )
        shape = tuple(int(self._scalar("<Q")) for _ in range(dimensions))
        return shape[::-1], int(self._scalar("<I")), int(self._scalar("<Q"))

    def _info(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> TensorInfo:
        if kind not in TYPES:
            raise CorruptShard(
                f"{self._name}: {_shown(name)} is of ggml type {kind}, which is unknown or retired; convert or "
                "download the model again"
            )
        dtype, weights, size = TYPES[kind]
        if math.prod(shape[-1:]) % weights:
            raise CorruptShard(
                f"{self._name}: {_shown(name)} has rows of {shape[-1]} weights, no multiple of the {weights} in a "
                f"block of {dtype}; {_AGAIN}"
            )
        end = start + math.prod(shape) // weights * size
        if end > self._size:
            raise CorruptShard(
                f"{self._name}: {_shown(name)} ends at byte {end}, but the file has {self._size}; {_AGAIN}"
            )
        return TensorInfo(dtype=dtype, shape=shape, start=start, end=end)

    def _scalar(self, layout: str) -> int | float | bool:
        at = self._at
        self._skip(struct.calcsize(layout), "a value")
        value: int | float | bool = struct.unpack_from(layout, self._data, at)[0]
        return value

    def _string(self) -> str:
        length = int(self._scalar("<Q"))
        at = self._at
        self._skip(length, f"a string of {length} bytes")
        try:
            return self._data[at : at + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptShard(
                f"{self._name}: has a string at byte {at} that is no UTF-8 ({error}); {_AGAIN}"
            ) from error

    def _skip(self, count: int, what: str) -> None:
        self._room(count, what)
        self._at += count

    def _room(self, count: int, what: str) -> None:
        if count > self._limit - self._at:
            raise CorruptShard(
                f"{self._name}: says {what} at byte {self._at}, but its header can reach byte {self._limit}; {_AGAIN}"
            )


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _shown(value: Scalar) -> str:
    """A name from a damaged file may be anything, and as long as it likes."""
    return repr(value)[:80] if isinstance(value, str) else str(value)
