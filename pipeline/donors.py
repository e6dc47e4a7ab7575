"""Where a target's packed bytes may come from: the recipe's own quantized source, and earlier artifacts of any name."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

from pipeline.artifacts import Artifact, Store, read_artifact
from pipeline.checkpoint import Checkpoint
from pipeline.errors import StoreCorrupt
from pipeline.kept import Donor
from pipeline.manifest import Manifest, Origin
from pipeline.target_layout import matches
from pipeline.targets import AWQTarget, Target, grid_of

DIVIDED = "divided out of "  # how the upcast says that an activation's scales left a weight other than it was packed


def of_source(target: Target, reference: str, source: Checkpoint, upcast: Manifest) -> Donor | None:
    """A packed source, where it is what `target` asks for; `upcast` is of the dense weights made from it.

    Its dense tensors carry whatever was folded into them already, so each module stands for itself.
    """
    if not matches(target, source):
        return None
    packed: dict[str, str] = dict(upcast.notes.get("packed", {}))
    divided = {reason.removeprefix(DIVIDED) for reason in upcast.notes.get("dropped", {}).values()}
    weights = [f"{module}.weight" for module in packed]
    return Donor(
        reference=reference,
        folder=source.path.absolute(),
        made_from={name: upcast.tensors[name] for name in weights if name in upcast.tensors and name not in divided},
        packed=packed,
        spared=_spared(source, packed),
        ancestor=True,
    )


def earlier(store: Store, target: Target, origin: Origin) -> Iterator[Donor]:
    """The store's artifacts that this version of the stage made with the options of `origin`, the newest first.

    Neither their calibration data nor their names matter; where the grid is the source's, their source does.
    """
    on_source = grid_of(target) != "fresh"
    alike = [
        artifact
        for artifact in _readable(store)
        if artifact.manifest.stage == origin.stage
        and artifact.manifest.stage_version == origin.stage_version
        and artifact.manifest.options.get("target") == origin.options["target"]
        and artifact.manifest.notes.get("made_from")
        and not (on_source and _source_of(artifact) != origin.parents.get("source"))
    ]
    for artifact in sorted(alike, key=lambda found: (found.manifest.created, found.reference), reverse=True):
        manifest = artifact.manifest
        yield Donor(
            reference=artifact.reference,
            folder=artifact.path,
            made_from=manifest.notes["made_from"],
            packed=manifest.packed,
            spared=frozenset(manifest.notes.get("dense", ())),
            folded=isinstance(target, AWQTarget),
        )


def _source_of(artifact: Artifact) -> str | None:
    return artifact.manifest.parents.get("source", {}).get("fingerprint")


def _spared(source: Checkpoint, packed: Collection[str]) -> frozenset[str]:
    """What bitsandbytes left dense without being told to: it would again."""
    quantization = source.quantization
    assert quantization is not None
    if quantization.method != "bitsandbytes" or quantization.raw.get("llm_int8_skip_modules") is not None:
        return frozenset()
    modules = {name.removesuffix(".weight") for name in source.tensors if name.endswith(".weight")}
    return frozenset(modules - set(packed))


def _readable(store: Store) -> Iterator[Artifact]:
    for variant in store.variants():
        for path in store.versions(variant.parent.name, variant.name):
            with contextlib.suppress(StoreCorrupt):  # another model's damage is none of this one's
                yield read_artifact(path)
