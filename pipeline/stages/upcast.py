"""Upcast: a checkpoint in any readable format becomes a dense one.

Every name and shape is checked against the architecture before the first byte is written; then each tensor is read,
dequantized, cast and written on its own, so memory is bounded by the largest.

A tied tensor that is stored as well (lm_head beside the embedding) is kept as it is: transformers ties the two where
they are equal and leaves them apart where they differ, which is also what it did with the source.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline import formats, progress
from pipeline.catalog import Format, format_of
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, NonFinite, UnexpectedTensor
from pipeline.formats import dense
from pipeline.formats.components import FLOATS, all_finite
from pipeline.shards import DTYPE_NAMES, ShardReader, ShardWriter, TensorGroup
from pipeline.skeleton import Skeleton, skeleton_of
from pipeline.stages import Job, Output

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """A tensor of the dense checkpoint, and the group that it is made from."""

    name: str
    group: TensorGroup
    dtype: torch.dtype
    shape: tuple[int, ...]
    transposed: bool


def run(job: Job) -> Iterator[Output]:
    """The dense checkpoint of `job.inputs["source"]` in `job.options["dtype"]`, as one output called dense.

    Raise an InputError before anything is written where the checkpoint is not what its architecture needs, NonFinite
    where a weight comes out NaN or infinite.
    """
    checkpoint = Checkpoint.open(job.inputs["source"])
    row = format_of(checkpoint.quantization)
    dtype = DTYPES[job.options["dtype"]]
    skeleton = skeleton_of(checkpoint, dtype=dtype, trust_remote_code=job.trust_remote_code)
    out = job.workspace / "out"
    with ShardReader(checkpoint) as reader:
        planned, dropped = _plan(reader, row, checkpoint, skeleton)
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        _write(planned, out, checkpoint, row)
    _write_config(checkpoint, out, job.options["dtype"])
    checkpoint.copy_companions(out)
    packed = sum(item.group.packed for item in planned)
    yield Output(
        variant="dense",
        folder=out,
        metrics={"tensors": len(planned), "dequantized": packed},
        notes={"dropped": dropped, "packed_source": row.name},
    )


def _plan(
    reader: ShardReader, row: Format, checkpoint: Checkpoint, skeleton: Skeleton
) -> tuple[list[_Planned], dict[str, str]]:
    """What to write, and what to drop and why; raise an InputError unless it is exactly what the architecture keeps."""
    planned: dict[str, _Planned] = {}
    dropped: dict[str, str] = {}
    for group in reader.groups(row):
        name = group.dense_name
        if name in planned:
            raise UnexpectedTensor(f"{name}: is stored both dense and as {row.title}; remove one of them")
        if name in skeleton.tensors:
            planned[name] = _planned(group, row, checkpoint, skeleton)
        elif reason := _reason_to_drop(group, skeleton):
            dropped[name] = reason
        else:
            raise UnexpectedTensor(
                f"{name}: {checkpoint.model_type or 'the architecture'} has no place for it; config.json does not "
                "describe these weights"
            )
    for name in skeleton.tensors:
        if name not in planned and not skeleton.may_lack(name, set(planned)):
            raise MissingTensor(f"{name}: is in no shard; the checkpoint is incomplete, download it again")
    return list(planned.values()), dropped


def _planned(group: TensorGroup, row: Format, checkpoint: Checkpoint, skeleton: Skeleton) -> _Planned:
    dtype, expected = skeleton.tensors[group.dense_name]
    transposed = group.packed and group.module in skeleton.transposed
    if group.packed:
        assert checkpoint.quantization is not None
        shape = formats.load(row).dense_shape(group, checkpoint.quantization)
        shape = shape[::-1] if transposed else shape
    else:
        shape = dense.dense_shape(group)
        stored = dense.dequantize(group).dtype
        if stored != dtype and not (stored in (*FLOATS, torch.float64) and dtype.is_floating_point):
            raise CheckpointError(
                f"{group.dense_name}: is {DTYPE_NAMES[stored]} and not packed in any way that {row.title} knows, "
                f"expected {DTYPE_NAMES[dtype]}; fix quantization_config in config.json"
            )
    if shape != expected:
        raise CheckpointError(
            f"{group.dense_name}: has shape {list(shape)}, but config.json describes {list(expected)}; the two do not "
            "belong together"
        )
    return _Planned(name=group.dense_name, group=group, dtype=dtype, shape=expected, transposed=transposed)


def _reason_to_drop(group: TensorGroup, skeleton: Skeleton) -> str:
    """Why a tensor that the architecture has no place for may go, or nothing."""
    if group.packed:
        return ""
    if skeleton.ignores(group.dense_name):
        return "the architecture ignores it"
    # Older GPTQ tools give every packed module a bias of zeros.
    if group.dense_name.endswith(".bias") and not dense.dequantize(group).any():
        return "a bias of zeros that the architecture does not have"
    return ""


def _write(planned: list[_Planned], out: Path, checkpoint: Checkpoint, row: Format) -> None:
    with ShardWriter(out, {item.name: (DTYPE_NAMES[item.dtype], item.shape) for item in planned}) as writer:
        for done, item in enumerate(planned, start=1):
            writer.write(item.name, _tensor(item, checkpoint, row))
            progress.step("upcast", done=done, total=len(planned), unit="tensors")


def _tensor(item: _Planned, checkpoint: Checkpoint, row: Format) -> torch.Tensor:
    """The dense tensor; raise NonFinite where a value of it is NaN or infinite."""
    if item.group.packed:
        assert checkpoint.quantization is not None
        wide = formats.load(row).dequantize(item.group, checkpoint.quantization)
    else:
        wide = dense.dequantize(item.group)
    tensor = wide.to(item.dtype)
    if tensor.is_floating_point() and not all_finite(tensor):
        if all_finite(wide):
            raise NonFinite(
                f"{item.name}: holds values too large for {DTYPE_NAMES[item.dtype]}; choose upcast.dtype "
                "bfloat16 or float32"
            )
        raise NonFinite(f"{item.name}: holds NaN or infinity; the checkpoint is damaged, download it again")
    return tensor.T if item.transposed else tensor


def _write_config(checkpoint: Checkpoint, out: Path, dtype: str) -> None:
    """Write config.json as it was, but dense: every other key in its place."""
    config: Mapping[str, object] = {
        key: dtype if key in {"dtype", "torch_dtype"} else value
        for key, value in checkpoint.config.items()
        if key not in {"quantization_config", "compression_config"}
    }
    if not {"dtype", "torch_dtype"} & config.keys():
        config = {**config, "dtype": dtype}
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
