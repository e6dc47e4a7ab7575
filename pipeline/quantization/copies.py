"""Packed bytes out of the folders that have them already, memory-mapped and checked against what was noted of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from pipeline.catalog import Format
from pipeline.checkpoint import Checkpoint, inside
from pipeline.digests import digest_packed, digest_tensors
from pipeline.errors import ReloadMismatch
from pipeline.kept import Donor, layer_of
from pipeline.shards import ShardReader


class Copies:
    """Tensors of the kept modules by name, and of folded layers the dense ones beside them.

    `shapes` maps each to its safetensors dtype and shape, as a ShardWriter takes them; `parts` each module to the names
    of its packed tensors. Raises ReloadMismatch where a donor's bytes are not those that its digest was taken of.
    """

    def __init__(self, kept: Mapping[str, Donor], row: Format) -> None:
        self._readers: dict[str, ShardReader] = {}
        self.shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.parts: dict[str, tuple[str, ...]] = {}
        by_folder: dict[Path, set[str]] = {}
        for module, donor in kept.items():
            by_folder.setdefault(donor.folder, set()).add(module)
        for modules in by_folder.values():
            self._add(kept[min(modules)], modules, row)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor called `name`, as its donor has it."""
        return self._readers[name][name]

    def _add(self, donor: Donor, modules: Collection[str], row: Format) -> None:
        checkpoint = Checkpoint.open(donor.folder)
        packed = row.packed_modules(checkpoint.tensors)
        check_noted(donor, checkpoint, {module: packed.get(module, ()) for module in modules})
        self.parts |= {module: tuple(module + part for part in packed[module]) for module in modules}
        names = [name for module in modules for name in self.parts[module]]
        if donor.folded:
            layers = {layer_of(module) for module in modules}
            of_others = {module + part for module, parts in packed.items() if module not in modules for part in parts}
            names += [name for name in checkpoint.tensors if layer_of(name) in layers and name not in of_others]
        reader = ShardReader(checkpoint)
        for name in names:
            info = checkpoint.tensors[name]
            self._readers[name] = reader
            self.shapes[name] = (info.dtype, info.shape)


def check_noted(donor: Donor, checkpoint: Checkpoint, packed: Mapping[str, tuple[str, ...]]) -> None:
    """Raise ReloadMismatch where the packed tensors of a module are no longer those that its digest was taken of."""
    names = [module + part for module, parts in packed.items() for part in parts]
    digests = digest_tensors(
        {name: (inside(checkpoint.folder, checkpoint.weight_map[name]), checkpoint.tensors[name]) for name in names}
    )
    for module, parts in sorted(packed.items()):
        if not parts or digest_packed(module, parts, digests) != donor.packed[module]:
            raise ReloadMismatch(
                f"{module}: its packed tensors in {donor.folder} are not those that {donor.reference} was noted to "
                "hold; restore that folder, or set calibration.refresh for one of the store"
            )
