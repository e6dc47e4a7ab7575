"""Tensors into shards, in any order, from any thread, a block of rows at a time.

The shapes are known before the first byte, so the files are allocated at once and every block goes straight to its
place. A shard is written beside its name, synced while later ones are written, and renamed when it is whole: whoever
finds it under its name may keep it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from pipeline.checkpoint import INDEX, SINGLE
from pipeline.digests import digest_bytes
from pipeline.errors import NoSpace
from pipeline.headers import ITEM_BITS, pack_header
from pipeline.shards import DTYPE_NAMES

MAX_SHARD_BYTES = 5 * 10**9  # the hub's own default
_SYNC_BYTES = 1 << 26  # written between two syncs: the disk is kept busy while the next blocks are computed
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(slots=True, kw_only=True)
class _Shard:
    """One file: what it holds, where, and how many tensors are still to come."""

    path: Path
    header: bytes
    nbytes: int
    positions: Mapping[str, int]
    pending: int
    handle: int = -1

    @property
    def part(self) -> Path:
        """Where it is written until it is whole."""
        return self.path.with_name(f"{self.path.name}.part")

    def is_whole(self) -> bool:
        """Whether an earlier run has written it: it is there, with this very header and of this size."""
        if not self.path.is_file() or self.path.stat().st_size != self.nbytes:
            return False
        with self.path.open("rb") as file:
            return file.read(len(self.header)) == self.header


class ShardWriter:
    """Writes tensors of known dtypes and shapes into one file, or several with an index; a context manager.

    `shapes` maps a tensor to its safetensors dtype and its shape, in the order in which they lie. With `resume`, a
    shard that an earlier writer of the same shapes finished is kept: its tensors are in `finished` and need not come.
    With `noted`, tensors come whole, and `digests` has each one's as it was in memory. Leaving the block without an
    error checks that every other tensor was written once, and writes the index. Raises NoSpace, leaving only whole
    shards, where the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[str, tuple[int, ...]]],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        resume: bool = False,
        noted: bool = False,
    ) -> None:
        self._folder = folder
        self._noted = noted
        self.digests: dict[str, str] = {}
        self._shapes = shapes
        self._left = {name: _nbytes(*shape) for name, shape in shapes.items()}
        self._total = sum(self._left.values())
        self._pending = set(shapes)
        self._shards = _shards(folder, shapes, max_shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.positions}
        self._lock = threading.Lock()
        self._syncing = _Syncing()
        whole = [shard for shard in self._shards if resume and shard.is_whole()]
        self.finished = frozenset(name for shard in whole for name in shard.positions)
        self.weight_map = {name: shard.path.name for name, shard in self._shard_of.items()}

    def __enter__(self) -> Self:
        self._pending -= self.finished
        with self._told_when_full():
            for shard in self._shards:
                if not shard.positions.keys() & self.finished:
                    shard.handle = os.open(shard.part, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
                    # A full disk says so here, not halfway.
                    os.posix_fallocate(shard.handle, 0, shard.nbytes)
                    _write_all(shard.handle, memoryview(shard.header), 0)
        self._syncing.start()
        return self

    def write(self, name: str, block: torch.Tensor, *, first: int = 0) -> bool:
        """Put `block`, which holds whole rows of `name` from row `first`, in its place.

        Its dtype and the shape of its rows must be those announced. Returns whether the tensor is now complete.
        """
        dtype, shape = self._shapes[name]
        assert DTYPE_NAMES[block.dtype] == dtype, f"{name}: {block.dtype}"
        whole = tuple(block.shape) == tuple(shape)
        rows = block.shape[1:] == torch.Size(shape[1:]) and bool(shape) and first + len(block) <= shape[0]
        assert whole or rows, f"{name}: {block.shape} from row {first}"
        assert name in self._pending, f"{name} is written twice"
        shard = self._shard_of[name]
        raw = block.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        if self._noted:
            assert whole, f"{name}: comes in parts"
            self.digests[name] = digest_bytes(dtype, shape, raw.numpy().data)
        position = shard.positions[name] + first * _nbytes(dtype, shape[1:])
        with self._told_when_full():
            _write_all(shard.handle, raw.numpy().data, position)
        self._syncing.wrote(shard.handle, raw.numel())
        return self._count(name, raw.numel())

    def _count(self, name: str, nbytes: int) -> bool:
        """Note that bytes of a tensor are written; finish its shard if they were the last."""
        shard = self._shard_of[name]
        with self._lock:
            self._left[name] -= nbytes
            assert self._left[name] >= 0, f"{name} is written twice"
            complete = not self._left[name]
            if complete:
                self._pending.discard(name)
                shard.pending -= 1
            whole = complete and not shard.pending
        if whole:
            self._syncing.forget(shard.handle)
            with self._told_when_full():
                os.fsync(shard.handle)
            os.close(shard.handle)
            shard.handle = -1
            shard.part.rename(shard.path)
        return complete

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._syncing.stop()
        unfinished = sorted(self._pending)
        self._discard()
        if kind is None:
            assert not unfinished, f"never written: {unfinished[:3]}"
            if len(self._shards) > 1:
                index = {"metadata": {"total_size": self._total}, "weight_map": self.weight_map}
                (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _discard(self) -> None:
        """Close and remove what is not whole."""
        for shard in self._shards:
            if shard.handle >= 0:
                os.close(shard.handle)
                shard.handle = -1
                shard.part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _told_when_full(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not self._syncing.started:
                self._discard()
            raise NoSpace(
                f"{self._folder}: cannot hold the {self._total / 1e9:.2f} GB that are to be written "
                f"({error.strerror}); free space or write elsewhere"
            ) from error


class _Syncing:
    """A thread that has the disk write what was handed over, so that little is left when a shard ends."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._behind: dict[int, int] = {}  # handle → bytes since its last sync
        self._busy = -1
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="sync", daemon=True)

    @property
    def started(self) -> bool:
        """Whether blocks are being written."""
        return self._thread.ident is not None

    def start(self) -> None:
        self._thread.start()

    def wrote(self, handle: int, nbytes: int) -> None:
        """Count bytes written to a file."""
        with self._wake:
            self._behind[handle] = self._behind.get(handle, 0) + nbytes
            if self._behind[handle] >= _SYNC_BYTES:
                self._wake.notify_all()

    def forget(self, handle: int) -> None:
        """Leave a file alone from now on: its owner closes it."""
        with self._wake:
            self._behind.pop(handle, None)
            self._wake.wait_for(lambda: self._busy != handle)

    def stop(self) -> None:
        """End the thread, once the sync it is in is over."""
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        if self.started:
            self._thread.join()

    def _due(self) -> int:
        return next((handle for handle, nbytes in self._behind.items() if nbytes >= _SYNC_BYTES), -1)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopped or self._due() >= 0)
                if self._stopped:
                    return
                self._busy = self._due()
                self._behind[self._busy] = 0
            # An error comes again at the shard's own sync, which reports it.
            with contextlib.suppress(OSError):
                os.fdatasync(self._busy)
            with self._wake:
                self._busy = -1
                self._wake.notify_all()


def _shards(folder: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]], limit: int) -> list[_Shard]:
    """The files: tensors in order, a new file where the next tensor would exceed `limit` bytes."""
    contents: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = _nbytes(*shape)
        if contents[-1] and size + nbytes > limit:
            contents.append([])
            size = 0
        contents[-1].append(name)
        size += nbytes
    shards = []
    for i, names in enumerate(contents):
        header, positions = pack_header({name: shapes[name] for name in names})
        nbytes = len(header) + sum(_nbytes(*shapes[name]) for name in names)
        file = SINGLE if len(contents) == 1 else f"model-{i + 1:05d}-of-{len(contents):05d}.safetensors"
        shards.append(_Shard(path=folder / file, header=header, nbytes=nbytes, positions=positions, pending=len(names)))
    return shards


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel()) * ITEM_BITS[dtype] // 8


def _write_all(file: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(file, data, position)
        data, position = data[written:], position + written
