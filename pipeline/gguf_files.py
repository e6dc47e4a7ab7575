"""The GGUF files that make one model: a single file, or parts called `<name>-00001-of-00003.gguf`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import CheckpointError, CorruptShard, UnexpectedTensor
from pipeline.gguf_headers import BLOCKS, DENSE_TYPES, Header, Scalar, read_gguf_header
from pipeline.headers import TensorInfo

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<base>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# Types whose blocks have a minimum or a zero point beside the scale.
_ASYMMETRIC = frozenset({"Q4_1", "Q5_1", "Q8_1", "Q2_K", "Q4_K", "Q5_K"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFModel:
    """What the parts of a model say together: `metadata` is the first part's, `tensors` are everyone's."""

    architecture: str
    metadata: Mapping[str, Scalar]
    weight_map: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]

    @property
    def dtype(self) -> str:
        """The ggml type that most weights of matrices have."""
        weights = Counter[str]()
        for info in self.tensors.values():
            weights[info.dtype] += math.prod(info.shape) if len(info.shape) > 1 else 0
        return weights.most_common(1)[0][0] if weights else "F32"

    @property
    def bits(self) -> int:
        """The bits of a code of the commonest type, as its name says."""
        found = re.search(r"\d+", self.dtype)
        assert found
        return int(found[0])

    @property
    def group_size(self) -> int:
        """Weights in a block of the commonest type; -1 where it has none."""
        return -1 if self.dtype in DENSE_TYPES else BLOCKS[self.dtype][0]

    @property
    def symmetric(self) -> bool:
        """Whether blocks of the commonest type have a scale alone."""
        return self.dtype not in _ASYMMETRIC


def is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a folder that holds some and no safetensors."""
    if path.is_dir():
        return any(path.glob(f"*{SUFFIX}")) and not any(path.glob("*.safetensors"))
    return path.suffix == SUFFIX and path.is_file()


def part_names(path: Path) -> tuple[str, ...]:
    """The file names of the one model that `path` names, a file or its folder; raise CheckpointError for several."""
    if not path.is_dir():
        return _siblings(path.name)
    models = {_siblings(found.name) for found in path.glob(f"*{SUFFIX}")}
    if len(models) > 1:
        names = ", ".join(sorted(model[0] for model in models))
        raise CheckpointError(f"{path}: holds several GGUF models ({names}); name the file of one")
    return models.pop()


def open_parts(files: Sequence[Path]) -> GGUFModel:
    """The model in `files`, all parts in order; raise a CheckpointError where one is missing or they disagree."""
    weight_map: dict[str, str] = {}
    tensors: dict[str, TensorInfo] = {}
    headers: list[Header] = []
    for number, path in enumerate(files):
        if not path.is_file():
            raise CorruptShard(
                f"{path.name}: is part {number + 1} of {len(files)} of the model, but missing; download it too"
            )
        header = read_gguf_header(path)
        _check_split(path, header, number, len(files))
        for name, info in header.tensors.items():
            if name in tensors:
                raise UnexpectedTensor(f"{name}: is in both {weight_map[name]} and {path.name}; download both again")
            weight_map[name], tensors[name] = path.name, info
        headers.append(header)
    metadata = headers[0].metadata
    architecture, expected = metadata.get("general.architecture"), metadata.get("split.tensors.count", len(tensors))
    if not isinstance(architecture, str) or not architecture:
        raise CorruptShard(f"{files[0].name}: has no general.architecture; the file is damaged, download it again")
    if expected != len(tensors):
        raise CorruptShard(
            f"{files[0].name}: says that the model has {expected} tensors, but its {len(files)} parts have "
            f"{len(tensors)}; download them again"
        )
    return GGUFModel(architecture=architecture, metadata=metadata, weight_map=weight_map, tensors=tensors)


def _siblings(name: str) -> tuple[str, ...]:
    found = _PART.fullmatch(name)
    if not found or not 1 <= int(found["number"]) <= int(found["count"]):
        return (name,)
    return tuple(f"{found['base']}-{i + 1:05d}-of-{found['count']}{SUFFIX}" for i in range(int(found["count"])))


def _check_split(path: Path, header: Header, number: int, count: int) -> None:
    said = header.metadata.get("split.count", 0), header.metadata.get("split.no", number)
    if count == 1 and said[0] in {0, 1}:
        return
    if said != (count, number):
        raise CorruptShard(
            f"{path.name}: says it is part {said[1]} (from 0) of {said[0]}, expected {number} of {count} by its name; "
            "keep the names that the parts were made with"
        )
