"""Which modules keep the packed bytes that they have somewhere: those whose dense weight is the one it was made from.

Digests are compared, nothing is dequantized. A module that is kept costs no calibration and loses nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.sizes import Sizes
from pipeline.targets import AWQTarget, BitsAndBytesTarget, GGUFTarget, Target, is_own, is_sequential

_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")  # the first number in a name counts the layers, a later one the experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Donor:
    """A quantized folder in a target's own format and options, whose packed bytes may be copied.

    `made_from` maps each dense tensor that its bytes depend on to that tensor's digest, `packed` each quantized module
    to the digest of its packed tensors. `spared` are weight matrices that its writer left dense. `folded` says that
    scales may have moved between modules of a layer, so that a layer is taken whole, dense tensors included, or not at
    all; without it a module stands for itself. `ancestor` says that the dense weights were dequantized from it, before
    whatever training: a module that changed may then stay on its grid.
    """

    reference: str
    folder: Path
    made_from: Mapping[str, str]
    packed: Mapping[str, str]
    spared: frozenset[str] = frozenset()
    folded: bool = False
    ancestor: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a target keeps: `wanted` are the modules that are packed, `modules` those that come from a donor."""

    wanted: frozenset[str]
    modules: Mapping[str, Donor]

    @property
    def described_by(self) -> Donor | None:
        """The donor whose quantization_config is right for the whole; None unless every module is kept."""
        if not self.wanted or self.modules.keys() != self.wanted:
            return None
        donors = {donor.reference: donor for donor in self.modules.values()}
        return next((donor for donor in donors.values() if donor.packed.keys() == self.wanted), None)

    @property
    def counted(self) -> dict[str, int]:
        """Donor's reference → how many modules it gives."""
        return dict(Counter(donor.reference for donor in self.modules.values()))


def keep(
    target: Target, shapes: Mapping[str, tuple[int, ...]], dense: Mapping[str, str], donors: Sequence[Donor]
) -> Kept:
    """What a target keeps of the earlier `donors` come first; `dense` maps the parent's tensors to their digests.

    All but AWQ keep module by module. AWQ keeps a layer whole where one donor has all of it, or else, from a
    donor that is not folded, the single modules that did not change.
    """
    unchanged = {donor.reference: _unchanged(donor, dense) for donor in donors}
    wanted = packable(target, shapes)
    for donor in donors:
        wanted -= donor.spared if unchanged[donor.reference] else frozenset()
    modules: dict[str, Donor] = {}
    for unit in _units(target, wanted):
        whole = [donor for donor in donors if _covers(donor, unit, unchanged[donor.reference])]
        parts = whole or [donor for donor in donors if not donor.folded and unit & unchanged[donor.reference]]
        for donor in parts[:1]:
            modules |= dict.fromkeys(sorted(unit & unchanged[donor.reference]), donor)
    return Kept(wanted=wanted, modules=modules)


def writable(target: Target, kept: Kept) -> Kept:
    """What the writer of a target keeps of `kept`.

    gptqmodel rounds a whole model or nothing of it: it moves AWQ's scales where it likes, and packs what it rounded.
    Sequential calibration is on what all the modules before give once they are rounded.
    """
    if kept.described_by or isinstance(target, BitsAndBytesTarget):
        return kept
    if is_own(target) and not is_sequential(target):
        return kept
    return replace(kept, modules={})


def unfolded(modules: Mapping[str, Donor]) -> frozenset[str]:
    """The layers in which AWQ may move no scales: a module of theirs is kept as it stands by itself."""
    layers = {layer_of(module) for module, donor in modules.items() if not donor.folded}
    return frozenset(layer for layer in layers if layer)


def packable(target: Target, shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """The modules that a target packs: linear layers, but for bitsandbytes those of the decoder's layers."""
    linears = Sizes(shapes=dict(shapes)).linears
    return frozenset(name for name in linears if isinstance(target, BitsAndBytesTarget) or layer_of(name))


def layer_of(name: str) -> str | None:
    """The layer that a tensor or module belongs to, such as `model.layers.3`; None outside of the layers."""
    match = _LAYER.match(name)
    return match.group() if match else None


def made_from(target: Target, packed: Sequence[str], dense: Mapping[str, str]) -> dict[str, str]:
    """The digests of the dense tensors that a target's packed modules depend on: weights, for AWQ whole layers.

    Nothing for GGUF, of which no module is ever kept: rounding it again costs no more than copying, and gives the same.
    """
    if isinstance(target, GGUFTarget):
        return {}
    if not isinstance(target, AWQTarget):
        return {f"{module}.weight": dense[f"{module}.weight"] for module in packed if f"{module}.weight" in dense}
    layers = {layer_of(module) for module in packed}
    return {name: digest for name, digest in dense.items() if layer_of(name) in layers}


def _units(target: Target, wanted: frozenset[str]) -> Iterator[frozenset[str]]:
    """What is kept together or not at all, in order of the names."""
    if not isinstance(target, AWQTarget):
        yield from (frozenset({module}) for module in sorted(wanted))
        return
    layers: dict[str | None, set[str]] = {}
    for module in sorted(wanted):
        layers.setdefault(layer_of(module), set()).add(module)
    yield from (frozenset(modules) for modules in layers.values())


def _covers(donor: Donor, unit: frozenset[str], unchanged: frozenset[str]) -> bool:
    """Whether a donor has all of a unit, and where scales may have moved in it, nothing else of its layer."""
    if not donor.folded:
        return unit <= unchanged
    layers = {layer_of(module) for module in unit}
    return unit == {module for module in unchanged if layer_of(module) in layers}


def _unchanged(donor: Donor, dense: Mapping[str, str]) -> frozenset[str]:
    """The modules of a donor that were made from what the parent has."""
    if not donor.folded:
        return frozenset(
            module
            for module in donor.packed
            if (name := f"{module}.weight") in dense and dense[name] == donor.made_from.get(name)
        )
    before, now = _by_layer(donor.made_from), _by_layer(dense)
    return frozenset(
        module for module in donor.packed if (layer := layer_of(module)) and before.get(layer, {}) == now.get(layer)
    )


def _by_layer(digests: Mapping[str, str]) -> dict[str, dict[str, str]]:
    layers: dict[str, dict[str, str]] = {}
    for name, digest in digests.items():
        if layer := layer_of(name):
            layers.setdefault(layer, {})[name] = digest
    return layers
