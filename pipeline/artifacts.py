"""The store: a stage's folder becomes a verified, atomic, versioned artifact.

    <store>/<name>/<variant>/v0003/          a plain Hugging Face folder, with artifact.json
    <store>/<name>/<variant>/production      a link to a version: an alias
    <store>/.store/blobs/ab/abcd…            every file once, by sha256; version folders are hard links into it
    <store>/.store/manifests/…               every manifest, likewise
    <store>/.store/work/<identity>/          what a stage writes before it is committed

A commit hashes and syncs the files where the stage wrote them, links them into the blobs, adds the manifest, and
renames the folder to its version: that rename is the commit. Hard links and the rename need one local file system.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.digests import digest_value
from pipeline.errors import NotInStore, RecipeError
from pipeline.manifest import MANIFEST, Content, Manifest, Origin, read_content

VERSION = re.compile(r"v(\d{4,})")
REFERENCE = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]*)/(?P<variant>[a-z0-9][a-z0-9._-]*)(@(?P<which>[A-Za-z0-9_-]+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A committed version: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def version(self) -> str:
        """The version's name, such as v0003."""
        return self.path.name

    @property
    def reference(self) -> str:
        """name/variant@version."""
        return f"{self.manifest.name}/{self.manifest.variant}@{self.version}"


class Store:
    """A folder of artifacts. Nothing is created before the first write."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private = root / ".store"

    @staticmethod
    def open(location: str) -> Store:
        """The store at a folder; raise RecipeError for a URL, which has no hard links and no atomic rename."""
        if "://" in location:
            raise RecipeError(f"store: {location} is a URL; versions are hard links in one file system, name a folder")
        root = Path(location).expanduser()
        if root.exists() and not root.is_dir():
            raise RecipeError(f"store: {location} is a file; name a folder")
        return Store(root.resolve())

    def variants(self) -> list[Path]:
        """The folder of each variant of each name."""
        return [variant for name in _folders(self.root) for variant in _folders(name)]

    def versions(self, name: str, variant: str) -> list[Path]:
        """The version folders of a variant, oldest first."""
        folder = self.root / name / variant
        if not folder.is_dir():
            return []
        found = [path for path in folder.iterdir() if VERSION.fullmatch(path.name) and not path.is_symlink()]
        return sorted(found, key=lambda path: int(path.name[1:]))

    def artifacts(self) -> Iterator[Artifact]:
        """Every artifact, by name, variant and version."""
        for name in _folders(self.root):
            for variant in _folders(name):
                for path in self.versions(name.name, variant.name):
                    yield read_artifact(path)

    def aliases(self, name: str, variant: str) -> dict[str, str]:
        """Alias → version of a variant."""
        folder = self.root / name / variant
        links = sorted(path for path in folder.iterdir() if path.is_symlink()) if folder.is_dir() else []
        return {link.name: link.readlink().name for link in links}

    def resolve(self, reference: str) -> Artifact:
        """The artifact of name/variant[@version|alias], the newest where neither is given; raise NotInStore."""
        match = REFERENCE.fullmatch(reference)
        if not match:
            raise NotInStore(
                f"{reference}: not a reference; write name/variant, name/variant@v0001 or name/variant@alias"
            )
        name, variant, which = match["name"], match["variant"], match["which"]
        versions = {path.name: path for path in self.versions(name, variant)}
        if not versions:
            known = ", ".join(f"{folder.parent.name}/{folder.name}" for folder in self.variants()) or "nothing"
            raise NotInStore(f"{reference}: the store {self.root} holds no {name}/{variant}; it holds {known}")
        aliases = self.aliases(name, variant)
        version = list(versions)[-1] if which is None else aliases.get(which, which)
        if version not in versions:
            known = ", ".join([*versions, *aliases])
            raise NotInStore(f"{reference}: {name}/{variant} has no version or alias {which}; it has {known}")
        return read_artifact(versions[version])

    def find(self, name: str, variant: str, fingerprint: str) -> Artifact | None:
        """The artifact with a fingerprint, the newest first; None where nothing was committed with it."""
        for path in reversed(self.versions(name, variant)):
            artifact = read_artifact(path)
            if artifact.manifest.fingerprint == fingerprint:
                return artifact
        return None

    @contextlib.contextmanager
    def workspace(self, identity: str) -> Iterator[Path]:
        """A folder for the work that `identity` names, held by one run at a time.

        What lies in it outlives an error or a kill, so that the next run resumes from it; leaving the block without
        an error removes it.
        """
        folder = self.private / "work" / identity
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            folder.mkdir(exist_ok=True)
            try:
                yield folder
                shutil.rmtree(folder)
            finally:
                if not folder.exists() or not any(folder.iterdir()):
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.with_suffix(".lock").unlink(missing_ok=True)

    def commit(
        self,
        folder: Path,
        *,
        name: str,
        variant: str,
        origin: Origin,
        parents: Mapping[str, Mapping[str, str]],
        metrics: Mapping[str, float],
        notes: Mapping[str, Any],
    ) -> Artifact:
        """Turn a finished folder of a workspace into the next version of name/variant.

        A fingerprint that is already committed gives the first artifact again, and the folder is left for its owner to
        remove. `parents` maps a role to {reference, fingerprint, digest}.
        """
        content = read_content(folder)
        manifest = Manifest.describe(
            content, name=name, variant=variant, origin=origin, parents=parents, metrics=metrics, notes=notes
        )
        for path in (folder / file for file in content.files):
            _sync(path)
        with self.locked():
            committed = self.find(name, variant, origin.fingerprint)
            if committed:
                return committed
            self._link_blobs(folder, content)
            self._link_manifest(folder, manifest)
            return read_artifact(self._name(folder, self.root / name / variant))

    def set_alias(self, artifact: Artifact, alias: str) -> None:
        """Point an alias at an artifact, in one rename."""
        if VERSION.fullmatch(alias) or not re.fullmatch(r"[a-z][a-z0-9_-]*", alias):
            raise NotInStore(f"alias {alias}: not a name for an alias; use lower-case letters, digits, - and _")
        with self.locked():
            temporary = artifact.path.parent / f".{alias}.{os.getpid()}"
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(artifact.version)
            temporary.rename(artifact.path.parent / alias)
            _sync(artifact.path.parent)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the store: one commit, alias or clean-up at a time."""
        self.private.mkdir(parents=True, exist_ok=True)
        with _locked(self.private / "lock"):
            yield

    def _link_blobs(self, folder: Path, content: Content) -> None:
        for relative, file in content.files.items():
            sha = str(file["sha256"])
            blob = self.private / "blobs" / sha[:2] / sha
            blob.parent.mkdir(parents=True, exist_ok=True)
            path = folder / relative
            # A blob that was damaged since is replaced by the good file at hand, not linked once more.
            if blob.exists() and filecmp.cmp(path, blob, shallow=False):
                _replace_by_link(path, blob)
            else:
                blob.unlink(missing_ok=True)
                path.chmod(0o444)  # a version is never written again; an edit through one link would change them all
                os.link(path, blob)
                _sync(blob.parent)

    def _link_manifest(self, folder: Path, manifest: Manifest) -> None:
        text = manifest.dumps()
        stored = self.private / "manifests" / f"{digest_value(text)}.json"
        stored.parent.mkdir(parents=True, exist_ok=True)
        path = folder / MANIFEST
        path.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o444)
        _sync(path)
        stored.unlink(missing_ok=True)
        os.link(path, stored)
        for part in {path.parent for path in folder.rglob("*")}:
            _sync(part)

    def _name(self, folder: Path, variant: Path) -> Path:
        """Rename a folder to its variant's next version; a number once given is not given again."""
        variant.mkdir(parents=True, exist_ok=True)
        counter = variant / ".last"
        taken = [int(path.name[1:]) for path in variant.iterdir() if VERSION.fullmatch(path.name)]
        last = max([int(counter.read_text()) if counter.exists() else 0, *taken])
        counter.write_text(str(last + 1))
        version = variant / f"v{last + 1:04d}"
        folder.rename(version)
        _sync(variant)
        return version


def read_artifact(path: Path) -> Artifact:
    """The artifact in a version folder."""
    return Artifact(path=path, manifest=Manifest.read(path))


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.is_symlink() and path.name[0] != ".")


def _replace_by_link(path: Path, blob: Path) -> None:
    temporary = path.with_name(f".{path.name}.link")
    os.link(blob, temporary)
    temporary.replace(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock; the system drops it when its holder dies."""
    while True:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        # Whoever held the lock before may have removed the file: then this lock guards nothing.
        if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
            break
        os.close(handle)
    try:
        yield
    finally:
        os.close(handle)
