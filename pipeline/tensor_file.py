"""One safetensors file that is whole as soon as it has its name: written beside, on the disk, then put there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write `tensors`, on the CPU, contiguous and none the memory of another; whatever lay at `path` is replaced."""
    part = path.with_name(f"{path.name}.part")
    save_file(dict(tensors), part, metadata=dict(metadata))
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(path)
