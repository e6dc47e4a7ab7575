"""Keeping a store: verify what lies there, walk its lineage, remove what nobody needs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import Artifact, Store
from pipeline.errors import NotInStore, StoreCorrupt
from pipeline.manifest import read_content

STALE = 7 * 24 * 3600.0  # seconds; younger work may be resumed, younger features used again


def verify(artifact: Artifact) -> None:
    """Hash every file again; raise StoreCorrupt naming the first that is not what the manifest says."""
    content = read_content(artifact.path)
    wanted = artifact.manifest.files
    remedy = "remove the version and run its recipe again"
    for name in sorted(wanted.keys() | content.files.keys()):
        if name not in content.files:
            raise StoreCorrupt(f"{artifact.reference}: {name} is missing; {remedy}")
        if name not in wanted:
            raise StoreCorrupt(f"{artifact.reference}: {name} is not in the manifest; {remedy}")
        if content.files[name]["sha256"] != wanted[name]["sha256"]:
            raise StoreCorrupt(f"{artifact.reference}: {name} has other bytes than the manifest says; {remedy}")
    if content.digest != artifact.manifest.digest or dict(content.tensors) != dict(artifact.manifest.tensors):
        raise StoreCorrupt(f"{artifact.reference}: the manifest's digests do not match its files; {remedy}")


def lineage(store: Store, artifact: Artifact) -> Iterator[tuple[int, str, str]]:
    """The artifact and its ancestors as (depth, role, reference), a parent right under its child."""
    by_fingerprint = {other.manifest.fingerprint: other for other in store.artifacts()}

    def walk(node: Artifact, role: str, depth: int) -> Iterator[tuple[int, str, str]]:
        yield depth, role, node.reference
        for parent_role, parent in node.manifest.parents.items():
            known = by_fingerprint.get(parent["fingerprint"])
            if known:
                yield from walk(known, parent_role, depth + 1)
            else:
                yield depth + 1, parent_role, parent["reference"]

    yield from walk(artifact, "", 0)


def remove(store: Store, artifact: Artifact) -> None:
    """Remove a version; raise NotInStore while an alias points at it. Its files go at the next `gc`."""
    manifest = artifact.manifest
    with store.locked():
        aliases = store.aliases(manifest.name, manifest.variant)
        held = sorted(alias for alias, version in aliases.items() if version == artifact.version)
        if held:
            raise NotInStore(f"{artifact.reference}: alias {held[0]} points at it; promote another version first")
        _discard(store, artifact.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What a clean-up removed."""

    versions: tuple[str, ...]
    files: int
    nbytes: int


def collect(store: Store, *, keep: int | None) -> Collected:
    """Remove all but the newest `keep` versions of each variant (None: all stay) and every file no version holds.

    A version that an alias points at stays, and so does every ancestor of a version that stays. What a killed run left,
    and the features of frozen backbones, go where nothing touched them for a week; of these only features are counted.
    """
    if keep is not None and keep < 1:
        raise NotInStore(f"gc --keep {keep}: keep at least 1 version of each variant")
    if not store.private.is_dir():
        return Collected(versions=(), files=0, nbytes=0)
    with store.locked():
        removed = _old_versions(store, keep) if keep is not None else []
        for artifact in removed:
            _discard(store, artifact.path)
        _drop_stale_work(store.private / "work")
        found = [_drop_unlinked(store.private), _drop_stale_features(store.private / "features")]
    files, nbytes = (sum(counts) for counts in zip(*found, strict=True))
    return Collected(versions=tuple(artifact.reference for artifact in removed), files=files, nbytes=nbytes)


def _old_versions(store: Store, keep: int) -> list[Artifact]:
    everything = list(store.artifacts())
    by_variant: dict[tuple[str, str], list[Artifact]] = {}
    for artifact in everything:
        by_variant.setdefault((artifact.manifest.name, artifact.manifest.variant), []).append(artifact)
    staying = {
        artifact.manifest.fingerprint: artifact
        for (name, variant), versions in by_variant.items()
        for i, artifact in enumerate(reversed(versions))
        if i < keep or artifact.version in store.aliases(name, variant).values()
    }
    by_fingerprint = {artifact.manifest.fingerprint: artifact for artifact in everything}
    pending = list(staying.values())
    while pending:
        for parent in pending.pop().manifest.parents.values():
            ancestor = by_fingerprint.get(parent["fingerprint"])
            if ancestor and ancestor.manifest.fingerprint not in staying:
                staying[ancestor.manifest.fingerprint] = ancestor
                pending.append(ancestor)
    return [artifact for artifact in everything if artifact.manifest.fingerprint not in staying]


def _discard(store: Store, version: Path) -> None:
    """Take a version out of sight in one rename, then delete it."""
    grave = store.private / "work" / f"removed-{os.getpid()}-{time.monotonic_ns()}"
    grave.parent.mkdir(parents=True, exist_ok=True)
    version.rename(grave)
    shutil.rmtree(grave)


def _drop_stale_work(work: Path) -> None:
    """Remove the work folders that no run holds and that nobody touched for a week."""
    for folder in [path for path in work.iterdir() if path.is_dir()] if work.is_dir() else []:
        newest = max((path.lstat().st_mtime for path in (folder, *folder.rglob("*"))), default=0.0)
        if time.time() - newest < STALE:
            continue
        with contextlib.suppress(BlockingIOError), _held(folder.with_suffix(".lock")):
            shutil.rmtree(folder)
            folder.with_suffix(".lock").unlink()


def _drop_stale_features(root: Path) -> tuple[int, int]:
    """Remove the sets of features that no run computes and none used for a week; a set's identity says when it was."""
    files = nbytes = 0
    for identity in [*root.glob("*/identity.json")]:
        if time.time() - identity.stat().st_mtime < STALE:
            continue
        # The lock stays: whoever waits for it must wait for the same file as those who come later.
        with contextlib.suppress(BlockingIOError), _held(identity.parent.with_suffix(".run")):
            sizes = [path.stat().st_size for path in identity.parent.iterdir()]
            shutil.rmtree(identity.parent)
            files, nbytes = files + len(sizes), nbytes + sum(sizes)
    return files, nbytes


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Hold a lock; raise BlockingIOError where a run holds it."""
    handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _drop_unlinked(private: Path) -> tuple[int, int]:
    """Remove blobs and manifests that only the store itself still links."""
    files = nbytes = 0
    for path in [*(private / "blobs").rglob("*"), *(private / "manifests").rglob("*")]:
        stat = path.lstat()
        if path.is_file() and stat.st_nlink == 1:
            path.unlink()
            files, nbytes = files + 1, nbytes + stat.st_size
    return files, nbytes
