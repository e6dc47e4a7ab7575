"""Upcast: a checkpoint in any readable format becomes a dense one.

Every name and shape is checked against the architecture before the first byte is written; then blocks of rows are read,
dequantized, cast and written on every core, so memory is bounded by the blocks and speed by the disk.

A tied tensor that is stored as well (lm_head beside the embedding) is kept as it is: transformers ties the two where
they are equal and leaves them apart where they differ, which is also what it did with the source.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline import pairing, progress
from pipeline.catalog import format_of
from pipeline.checkpoint import QUANTIZATION_KEYS, Checkpoint, copy_companions, read_json
from pipeline.digests import digest_value, file_marks
from pipeline.jobs import Job, Output
from pipeline.shard_writer import MAX_SHARD_BYTES, ShardWriter
from pipeline.upcasting import stream
from pipeline.upcasting.layout import laid_out

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def run(job: Job) -> Iterator[Output]:
    """The dense checkpoint of `job.inputs["source"]` in `job.options["dtype"]`, as one output called dense.

    Shards hold at most `job.options["max_shard_bytes"]` (by default the hub's own limit); those that an earlier run of
    the same job finished are kept. Raise an InputError before anything is written where the checkpoint is not what its
    architecture needs, NonFinite where a weight comes out NaN or infinite.
    """
    checkpoint = Checkpoint.open(job.inputs["source"])
    if pairing.is_projected(checkpoint.path):
        pairing.check(checkpoint.path)
    row = format_of(checkpoint.quantization)
    dtype = job.options["dtype"]
    with laid_out(checkpoint, row, dtype=DTYPES[dtype], trust_remote_code=job.trust_remote_code) as layout:
        if layout.problems:
            raise layout.problems[0]
        out = _prepare(job, checkpoint)
        limit = job.options.get("max_shard_bytes", MAX_SHARD_BYTES)
        with ShardWriter(out, layout.shapes, max_shard_bytes=limit, resume=True) as writer:
            kept, total = len(writer.finished), len(layout.pieces)
            for done, _ in enumerate(stream.write(layout.pieces, writer, row, checkpoint.quantization), start=1):
                progress.step("upcast", done=kept + done, total=total, unit="tensors")
        _write_config(layout.described, out, dtype)
        copy_companions(layout.described, out)
    if pairing.is_projected(out):
        pairing.seal(out)
    packed = sum(piece.group.packed for piece in layout.pieces)
    yield Output(
        variant="dense",
        folder=out,
        metrics={"tensors": len(layout.pieces), "dequantized": packed},
        notes={
            "dropped": dict(layout.dropped),
            "packed_source": row.name,
            "packed": stream.packed_digests(checkpoint, row),
        },
    )


def _prepare(job: Job, checkpoint: Checkpoint) -> Path:
    """The folder to write to; shards that lie there are kept only where they were made of these files and options."""
    out, mark = job.workspace / "out", job.workspace / "source.sha256"
    identity = digest_value([file_marks(checkpoint.folder, checkpoint.files), dict(job.options)])
    same = mark.exists() and mark.read_text(encoding="utf-8") == identity
    shards = {path.name: path.rename(job.workspace / path.name) for path in out.glob("*.safetensors") if same}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name, path in shards.items():
        path.rename(out / name)
    mark.write_text(identity, encoding="utf-8")
    return out


def _write_config(described: Path, out: Path, dtype: str) -> None:
    """Write config.json as it was, but dense: every other key in its place."""
    config = _dense(read_json(described / "config.json"), dtype)
    if not {"dtype", "torch_dtype"} & config.keys():
        config = {**config, "dtype": dtype}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def _dense(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """`config`, and what it says of a model's parts, without how weights were quantized, and in `dtype`."""
    kept = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    for key, value in kept.items():
        if key in {"dtype", "torch_dtype"}:
            kept[key] = dtype
        elif key.endswith("_config") and isinstance(value, dict):
            kept[key] = _dense(value, dtype)
    return kept
