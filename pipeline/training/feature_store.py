"""Features on disk: vectors in a flat file that only grows, and an index of the rows that they belong to.

    <root>/<fingerprint>/identity.json      what was computed, for people; its time is when the set was last used
    <root>/<fingerprint>/<random>.f32       float32 vectors, one after another
    <root>/<fingerprint>/index.safetensors  a row's key (32 bytes) → first vector and how many; which file; a digest
    <root>/<fingerprint>.run  .append       locks: of whoever computes, and of whoever appends

Vectors are synced before the index that names them is renamed into its place, so whatever lies beyond the index is half
of an append that was killed, and is overwritten. A file that was once mapped never shrinks below its index: a set that
begins anew begins in another file. What reads a set holds a mapping, which outlives the set's removal.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline import progress, tensor_file
from pipeline.digests import digest_value
from pipeline.errors import NoSpace

VERSION = 1  # of these files, and of how a feature is computed
INDEX, IDENTITY = "index.safetensors", "identity.json"
KEY = 32  # bytes of a row's key, a SHA-256
ITEM = 4  # bytes of a float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """Row key → (first vector, vectors), in the file `vectors`, of which `end` vectors are whole."""

    vectors: str
    places: Mapping[bytes, tuple[int, int]] = field(default_factory=dict)
    end: int = 0


class FeatureSet:
    """The features of one identity: backbone, dtype, what is kept of a row; vectors of `width` values."""

    def __init__(self, root: Path, identity: Mapping[str, Any], *, width: int) -> None:
        identity = {**identity, "width": width, "version": VERSION}
        self._root = root
        self._identity = identity
        self._fingerprint = digest_value(identity)
        self.folder = root / self._fingerprint
        self.width = width

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Be the only run that computes for this set; others wait, and then find what this one computed."""
        with _locked(
            self._root / f"{self._fingerprint}.run", say="waits for another run that computes the same features"
        ):
            self.folder.mkdir(exist_ok=True)
            path = self.folder / IDENTITY
            path.write_text(json.dumps(self._identity, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            yield

    def index(self) -> Index:
        """What is there: nothing, in a new file, where the index is missing, damaged or ahead of its vectors."""
        path = self.folder / INDEX
        try:
            with safe_open(path, framework="pt") as file:
                said = file.metadata() or {}
                keys, places = file.get_tensor("keys"), file.get_tensor("places")
            vectors = self.folder / Path(said["vectors"]).name
            end = int(places.sum(1).max()) if len(places) else 0
            size = vectors.stat().st_size
        except (OSError, SafetensorError, KeyError, RuntimeError, ValueError, IndexError):
            return Index(vectors=f"{secrets.token_hex(8)}.f32")
        if said.get("digest") != _digest(keys, places) or size < end * self.width * ITEM:
            return Index(vectors=f"{secrets.token_hex(8)}.f32")
        raw = keys.numpy().tobytes()
        names = (raw[i : i + KEY] for i in range(0, len(raw), KEY))
        pairs = ((first, count) for first, count in places.tolist())
        return Index(vectors=vectors.name, places=dict(zip(names, pairs, strict=True)), end=end)

    def append(self, keys: Sequence[bytes], counts: Sequence[int], vectors: Tensor) -> None:
        """Add rows and sync them; `vectors` float32 [sum of counts, width]. A row that is there already is kept."""
        with _locked(self._root / f"{self._fingerprint}.append"):
            index = self.index()
            for stale in self.folder.glob("*.f32"):
                if stale.name != index.vectors:
                    stale.unlink()
            with (self.folder / index.vectors).open("r+b" if index.end else "wb") as file:
                file.truncate(index.end * self.width * ITEM)
                file.seek(0, os.SEEK_END)
                file.write(vectors.contiguous().numpy().data)
                file.flush()
                os.fsync(file.fileno())
            places, end = dict(index.places), index.end
            for key, count in zip(keys, counts, strict=True):
                places.setdefault(key, (end, count))
                end += count
            self._write_index(index.vectors, places)

    def map(self, index: Index) -> Tensor:
        """The vectors [end, width] of an index, mapped: read when they are used, in memory that others can have."""
        if index.end == 0:
            return torch.empty(0, self.width)
        path = str(self.folder / index.vectors)
        flat = torch.from_file(path, shared=False, size=index.end * self.width, dtype=torch.float32)
        return flat.view(index.end, self.width)

    def reserve(self, rows: int, vectors: int, *, whole: int, limit_bytes: int | None) -> None:
        """Make room for so many more rows and vectors, `whole` vectors being all that the run needs.

        Sets that were used longest ago go first, this one's other rows last. Raise NoSpace, before anything is
        computed, where that is not enough.
        """
        new, needed = (vectors * self.width * ITEM + rows * 64, whole * self.width * ITEM)
        if limit_bytes is not None and needed > limit_bytes:
            raise NoSpace(
                f"features: need {needed / 1e6:.1f} MB, the limit is {limit_bytes / 1e6:.1f} MB; "
                "raise the limit, give fewer rows, or use train.engine: trainer"
            )
        if limit_bytes is not None and self._size() + new > limit_bytes:
            for path in (self.folder / INDEX, *self.folder.glob("*.f32")):  # rows of other data: this run's alone fit
                path.unlink(missing_ok=True)
        mine = self._size() + new
        for other in self._others():
            crowded = limit_bytes is not None and mine + _bytes(self._root) - self._size() > limit_bytes
            if crowded or shutil.disk_usage(self._root).free < new:
                _remove(other)
        if (free := shutil.disk_usage(self._root).free) < new:
            raise NoSpace(
                f"features: need {new / 1e6:.1f} MB, {self._root} has {free / 1e6:.1f} MB free; free some, "
                "or use train.engine: trainer"
            )

    def _write_index(self, vectors: str, places: Mapping[bytes, tuple[int, int]]) -> None:
        keys = torch.frombuffer(bytearray(b"".join(places)), dtype=torch.uint8).view(-1, KEY)
        where = torch.tensor(list(places.values()), dtype=torch.int64)
        said = {"vectors": vectors, "digest": _digest(keys, where)}
        tensor_file.save(self.folder / INDEX, {"keys": keys, "places": where}, metadata=said)

    def _size(self) -> int:
        return _bytes(self.folder)

    def _others(self) -> list[Path]:
        """The other sets, the one that was used longest ago first."""
        found = [path.parent for path in self._root.glob(f"*/{IDENTITY}") if path.parent != self.folder]
        return sorted(found, key=lambda folder: (folder / IDENTITY).stat().st_mtime_ns)


def _digest(keys: Tensor, places: Tensor) -> str:
    return hashlib.sha256(keys.numpy().tobytes() + places.numpy().tobytes()).hexdigest()


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another run may remove it at this moment
            total += path.stat().st_size if path.is_file() else 0
    return total


def _remove(folder: Path) -> None:
    """Remove a set, unless a run computes it at this moment."""
    with contextlib.suppress(BlockingIOError), _locked(folder.with_suffix(".run"), wait=False):
        shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = True, say: str = "") -> Iterator[None]:
    """Hold the lock, after saying so where it is held elsewhere; raise BlockingIOError there where not to `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            if say:
                progress.message("train", say)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
