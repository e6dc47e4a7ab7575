"""SHA-256 of files, of the tensors in them, and of plain values; file digests are remembered between runs."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.headers import read_header

CHUNK = 1 << 22


def digest_value(value: Any) -> str:
    """The digest of a plain value: its canonical JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_shard(path: Path) -> tuple[str, dict[str, str]]:
    """The digest of a safetensors file, and of each tensor in it (dtype, shape and bytes), in one pass."""
    tensors = read_header(path)
    whole = hashlib.sha256()
    parts: dict[str, str] = {}
    with path.open("rb") as file:
        whole.update(file.read(min((info.start for info in tensors.values()), default=path.stat().st_size)))
        for name, info in tensors.items():
            part = hashlib.sha256(f"{info.dtype}{list(info.shape)}".encode())
            left = info.end - info.start
            while left:
                chunk = file.read(min(CHUNK, left))
                whole.update(chunk)
                part.update(chunk)
                left -= len(chunk)
            parts[name] = part.hexdigest()
    return whole.hexdigest(), parts


class DigestCache:
    """File digests by path, size, mtime and inode, kept in the user's cache folder.

    A file whose four figures are unchanged is not read again. Losing the cache costs time, never correctness.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or _cache_folder() / "digests.json"
        try:
            self._known: dict[str, list[Any]] = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}
        self._changed = False

    def file(self, path: Path) -> str:
        """The digest of one file."""
        real = path.resolve()
        stat = real.stat()
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(str(real))
        if known and known[:3] == mark:
            return str(known[3])
        digest = digest_file(real)
        self._known[str(real)] = [*mark, digest]
        self._changed = True
        return digest

    def files(self, folder: Path, names: Iterable[str]) -> str:
        """The digest of several files of a folder, by their names and contents."""
        return content_digest({name: self.file(folder / name) for name in names})

    def save(self) -> None:
        """Keep what was learnt; a cache folder that cannot be written is no error."""
        if not self._changed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self._known, file)
            Path(name).replace(self._path)
        except OSError:
            return
        self._changed = False


def content_digest(files: Mapping[str, str]) -> str:
    """The digest of a folder's content: its file names and their digests."""
    return digest_value(sorted(files.items()))


def _cache_folder() -> Path:
    base = os.environ.get("REQUANT_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "requant"
