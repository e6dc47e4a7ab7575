"""Packed tensors through the cores and out to their places, a block of rows at a time.

Every core takes the next block, dequantizes it on a thread of its own and writes it, so that one reads while another
computes and the disk takes what a third has handed over. Memory is bounded by the blocks, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline import formats
from pipeline.catalog import DENSE, Format
from pipeline.cgroup import cores
from pipeline.checkpoint import Checkpoint
from pipeline.digests import digest_packed, digest_tensors
from pipeline.errors import NonFinite
from pipeline.formats import ROW_STEP
from pipeline.formats.components import ALL
from pipeline.formats.scaled_activation import fold
from pipeline.pieces import Piece
from pipeline.quantization_config import Quantization
from pipeline.shard_writer import ShardWriter
from pipeline.shards import DTYPE_NAMES
from pipeline.sizes import packed_modules

BLOCK = 1 << 21  # weights computed at a time: 8 MiB of floats; with fewer, threads wait for each other in Python
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _LARGEST_KEPT = -1, -3, 1 << 25  # malloc.h; the largest that glibc allows
_LARGEST_ON_GPU = 1 << 30  # weights: four gigabytes of floats for each thread
CPU = torch.device("cpu")
_AHEAD = 8  # blocks for each core that wait their turn


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Rows of a piece; ALL for one that is finished as a whole."""

    piece: Piece
    rows: slice


def write(
    pieces: Sequence[Piece], writer: ShardWriter, row: Format, quantization: Quantization | None, *, threads: int = 0
) -> Iterator[str]:
    """Write every piece that `writer` lacks; yield the name of each tensor as it is completed.

    `threads` 0 takes one a core; they compute on a GPU where there is one that is faster. Raises NonFinite where a
    value is NaN, infinite or too large for its dtype; what the format's reader raises comes through, and nothing is
    written after it.
    """
    wanted = [piece for piece in pieces if piece.name not in writer.finished]
    device = fastest(wanted, row, quantization)
    one_at_a_time = threading.Lock()

    def work(block: _Block) -> str | None:
        # Weights that are finished whole are large: two at once would double the memory.
        with one_at_a_time if block.piece.finish else contextlib.nullcontext():
            tensor = compute(block.piece, row, quantization, block.rows, device)
        complete = writer.write(block.piece.name, tensor, first=block.rows.start or 0)
        return block.piece.name if complete else None

    yield from _in_threads(work, _blocks(wanted, device), threads or cores())


def compute(
    piece: Piece, row: Format, quantization: Quantization | None, rows: slice, device: torch.device = CPU
) -> Tensor:
    """`rows` of a piece in its dtype, on `device` where it is packed.

    Raise NonFinite where a value of them is not finite in that dtype.
    """
    reader, group = formats.load(row if piece.group.packed else DENSE), piece.group
    if group.packed and device != CPU:
        group = replace(group, tensors={name: tensor.to(device) for name, tensor in group.tensors.items()})
    # A dense tensor is read without asking how the packed ones are quantized.
    wide = reader.dequantize(group, quantization, rows)  # type: ignore[arg-type]
    if piece.divided_by is not None:
        wide = fold(wide, piece.divided_by.to(wide.device))
    if piece.finish is not None:
        wide = piece.finish(wide)
    if wide.is_floating_point() and wide.numel():
        _check_finite(piece, wide)
    return wide.to(piece.dtype)


def fastest(pieces: Sequence[Piece], row: Format, quantization: Quantization | None) -> torch.device:
    """The first GPU, where it gives the largest packed piece back sooner than the cores compute it; else the CPU.

    What comes out is the same to the last bit: codes and scales are multiplied and rounded once, in float32.
    """
    packed = [piece for piece in pieces if piece.group.packed]
    if not torch.cuda.is_available() or not packed:
        return CPU
    piece = max(packed, key=lambda piece: torch.Size(piece.shape).numel())
    count, (block, *_) = torch.Size(piece.shape).numel(), _blocks([piece], CPU)
    gpu = torch.device("cuda", 0)

    def seconds(rows: slice, device: torch.device) -> float:
        compute(piece, row, quantization, rows, device).cpu()  # the first time, tables and kernels are made too
        started = time.perf_counter()
        compute(piece, row, quantization, rows, device).cpu()
        return time.perf_counter() - started

    share = 1.0 if block.rows == ALL else (block.rows.stop - block.rows.start) / piece.shape[0]
    try:
        faster = count <= _LARGEST_ON_GPU and seconds(ALL, gpu) < seconds(block.rows, CPU) / share / cores()
    except torch.OutOfMemoryError:  # somebody else's model is on it
        return CPU
    return gpu if faster else CPU


def packed_digests(checkpoint: Checkpoint, row: Format) -> dict[str, str]:
    """Packed module → the digest of its packed tensors, by which a later stage knows them again."""
    packed = packed_modules(checkpoint, row)
    names = [module + part for module, parts in packed.items() for part in parts]
    tensors = digest_tensors(
        {name: (checkpoint.folder / checkpoint.weight_map[name], checkpoint.tensors[name]) for name in names}
    )
    return {module: digest_packed(module, parts, tensors) for module, parts in packed.items()}


def _check_finite(piece: Piece, wide: Tensor) -> None:
    low, high = torch.aminmax(wide)  # both propagate NaN
    largest = max(-float(low), float(high))
    if largest <= torch.finfo(piece.dtype).max:
        return
    if largest < float("inf"):
        raise NonFinite(
            f"{piece.name}: holds values too large for {DTYPE_NAMES[piece.dtype]}; choose upcast.dtype bfloat16 or "
            "float32"
        )
    raise NonFinite(f"{piece.name}: holds NaN or infinity; the checkpoint is damaged, download it again")


def _blocks(pieces: Sequence[Piece], device: torch.device) -> Iterator[_Block]:
    """Each piece in blocks of rows; whole, where it crosses to a GPU anyway."""
    for unread in pieces:
        # Opened once for all of its blocks: a tensor is a view of the mapped file, but takes a tenth of a millisecond.
        piece = replace(unread, group=replace(unread.group, tensors=dict(unread.group.tensors)))
        count = piece.shape[0] if piece.shape else 0
        width = torch.Size(piece.shape[1:]).numel()
        step = BLOCK // max(1, width)
        if len(piece.shape) <= 2:  # noqa: PLR2004 - the rows of a matrix come in steps, experts one by one
            step = max(ROW_STEP, step // ROW_STEP * ROW_STEP)
        step = max(1, step)
        if piece.finish is not None or count <= step or (piece.group.packed and device != CPU):
            yield _Block(piece=piece, rows=ALL)
            continue
        for start in range(0, count, step):
            yield _Block(piece=piece, rows=slice(start, min(start + step, count)))


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next block: fresh pages cost more than the arithmetic that fills them."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        libc.mallopt(_M_TRIM_THRESHOLD, 8 * _LARGEST_KEPT)


def _in_threads(work: Callable[[_Block], str | None], blocks: Iterator[_Block], count: int) -> Iterator[str]:
    """What `work` returns for each block, in order; the first error ends it once every thread has stopped."""
    _keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # in each of the threads: they share the cores among blocks, not within one
    pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix="upcast")
    running: deque[Future[str | None]] = deque()
    try:
        while block := next(blocks, None):
            running.append(pool.submit(work, block))
            while len(running) >= _AHEAD * count:
                yield from filter(None, [running.popleft().result()])
        while running:
            yield from filter(None, [running.popleft().result()])
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
