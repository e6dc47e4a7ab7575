"""SHA-256 of files, of the tensors in them, and of plain values; file digests are remembered between runs."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.cache import cache_folder
from pipeline.cgroup import cores
from pipeline.headers import TensorInfo, read_header

CHUNK = 1 << 22


def digest_value(value: Any) -> str:
    """The digest of a plain value: its canonical JSON, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_shard(path: Path) -> tuple[str, dict[str, str]]:
    """The digest of a safetensors file, and of each tensor in it, on every core at once."""
    tensors = read_header(path)
    with ThreadPoolExecutor(max_workers=1) as pool:
        whole = pool.submit(digest_file, path)
        parts = digest_tensors({name: (path, info) for name, info in tensors.items()})
        return whole.result(), parts


def digest_tensors(places: Mapping[str, tuple[Path, TensorInfo]]) -> dict[str, str]:
    """Tensor → its digest, where `places` says in which file each is and where; on every core at once."""
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        return dict(zip(places, pool.map(lambda place: _digest_tensor(*place), places.values()), strict=True))


def _digest_tensor(path: Path, info: TensorInfo) -> str:
    """The digest of one tensor in a file: its dtype, its shape and its bytes."""
    digest = _begun(info.dtype, info.shape)
    with path.open("rb") as file:
        file.seek(info.start)
        left = info.end - info.start
        while left:
            chunk = file.read(min(CHUNK, left))
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def digest_bytes(dtype: str, shape: Sequence[int], data: memoryview) -> str:
    """The digest of one tensor in memory, as `digest_tensors` has it of one in a file; `dtype` is safetensors' name."""
    digest = _begun(dtype, shape)
    digest.update(data)
    return digest.hexdigest()


def _begun(dtype: str, shape: Sequence[int]) -> hashlib._Hash:
    return hashlib.sha256(f"{dtype}{list(shape)}".encode())


def digest_packed(module: str, parts: Iterable[str], tensors: Mapping[str, str]) -> str:
    """The digest of a packed module, from those of its tensors; `parts` are what follows the module in their names."""
    return digest_value([[part.lstrip("._"), tensors[module + part]] for part in parts])


def file_marks(folder: Path, names: Iterable[str]) -> list[list[str | int]]:
    """By which files are known again without reading them: name, size, mtime and inode of each."""
    return [[name, *_mark(folder / name)] for name in names]


def _mark(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


class DigestCache:
    """File digests by path, size, mtime and inode, kept in the user's cache folder.

    A file whose four figures are unchanged is not read again. Losing the cache costs time, never correctness.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or cache_folder() / "digests.json"
        try:
            self._known: dict[str, list[Any]] = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}
        self._changed = False

    def file(self, path: Path) -> str:
        """The digest of one file."""
        real = path.resolve()
        mark = _mark(real)
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

    def sequence(self, paths: Sequence[Path]) -> str:
        """The digest of several files' contents, in order and whatever their names; of one file, that file's own."""
        digests = [self.file(path) for path in paths]
        return digests[0] if len(digests) == 1 else digest_value(digests)

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
