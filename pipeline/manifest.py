"""What a committed artifact says of itself: `artifact.json`, beside its content files.

The digest covers the content files alone. Everything else (metrics, times, host, versions) is told, not hashed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.catalog import format_of
from pipeline.digests import content_digest, digest_file, digest_packed, digest_shard, digest_value
from pipeline.errors import StoreCorrupt, UnsupportedFormat
from pipeline.quantization_config import Quantization

MANIFEST = "artifact.json"
SCHEMA = 1
LIBRARIES = (
    "requant", "torch", "transformers", "accelerate", "peft", "safetensors", "bitsandbytes", "gptqmodel", "optimum",
    "gguf",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Why an artifact is what it is; known before its stage runs, and hashed into its fingerprint.

    `parents` maps a role to a fingerprint (the source: its digest), `data` a role to the digest of a file.
    """

    stage: str
    stage_version: int
    options: Mapping[str, Any]
    parents: Mapping[str, str]
    data: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """The identity of whatever this origin gives rise to."""
        return digest_value(asdict(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """The digests of everything in a folder."""

    files: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, str]
    packed: Mapping[str, str]

    @property
    def digest(self) -> str:
        """The digest of the content files alone."""
        return content_digest({name: str(file["sha256"]) for name, file in self.files.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of artifact.json.

    `parents` maps a role to {reference, fingerprint, digest}; `files` a relative path to {sha256, bytes}; `tensors` a
    tensor to its digest; `packed` a quantized module to the digest of its packed tensors.
    """

    name: str
    variant: str
    stage: str
    stage_version: int
    fingerprint: str
    digest: str
    options: Mapping[str, Any]
    parents: Mapping[str, Mapping[str, str]]
    data: Mapping[str, str]
    metrics: Mapping[str, float]
    notes: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, str]
    packed: Mapping[str, str]
    software: Mapping[str, str]
    hardware: Mapping[str, Any]
    created: str
    schema: int = SCHEMA

    @staticmethod
    def describe(
        content: Content,
        *,
        name: str,
        variant: str,
        origin: Origin,
        parents: Mapping[str, Mapping[str, str]],
        metrics: Mapping[str, float],
        notes: Mapping[str, Any],
    ) -> Manifest:
        """The manifest of content that was made here and now."""
        return Manifest(
            name=name,
            variant=variant,
            stage=origin.stage,
            stage_version=origin.stage_version,
            fingerprint=origin.fingerprint,
            digest=content.digest,
            options=origin.options,
            parents=parents,
            data=origin.data,
            metrics=metrics,
            notes=notes,
            files=content.files,
            tensors=content.tensors,
            packed=content.packed,
            software=software(),
            hardware=hardware(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def dumps(self) -> str:
        """The manifest as JSON text."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read a version folder's manifest; raise StoreCorrupt if it is none."""
        try:
            value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            manifest = Manifest(**value)
        except (OSError, ValueError, TypeError) as error:
            raise StoreCorrupt(
                f"{folder / MANIFEST}: cannot be read ({error}); remove the version with rm -r"
            ) from error
        if manifest.schema != SCHEMA:
            raise StoreCorrupt(
                f"{folder / MANIFEST}: schema {manifest.schema}, this requant reads {SCHEMA}; upgrade it"
            )
        return manifest

    @property
    def nbytes(self) -> int:
        """Bytes of the content files."""
        return sum(int(file["bytes"]) for file in self.files.values())


def read_content(folder: Path) -> Content:
    """Hash every file of a folder once, and the tensors in its shards on the way."""
    files: dict[str, dict[str, Any]] = {}
    tensors: dict[str, str] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        if path.suffix == ".safetensors":
            digest, parts = digest_shard(path)
            tensors |= parts
        else:
            digest = digest_file(path)
        files[path.relative_to(folder).as_posix()] = {"sha256": digest, "bytes": path.stat().st_size}
    return Content(files=files, tensors=tensors, packed=_packed(folder, tensors))


def _packed(folder: Path, tensors: Mapping[str, str]) -> dict[str, str]:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        row = format_of(Quantization.parse(raw) if raw else None)
    except (OSError, UnsupportedFormat):  # an adapter or a report has no config; an unknown format has no known parts
        return {}
    return {module: digest_packed(module, parts, tensors) for module, parts in row.packed_modules(tensors).items()}


def software() -> dict[str, str]:
    """The versions of Python and of the libraries that shape a result."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """The machine: its architecture, system and core count."""
    return {"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()}
