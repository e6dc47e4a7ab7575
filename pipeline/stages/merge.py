"""Merge: an adapter is folded into the dense checkpoint that it was trained on.

What the adapter does not touch is copied byte for byte; what it touches is merged in float32 and rounded once, to the
dtype it had. Names, shapes, dtypes and order are the base's. Memory is bounded by the adapter and one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline import progress
from pipeline.checkpoint import Checkpoint
from pipeline.shard_writer import ShardWriter
from pipeline.shards import DTYPES, ShardReader
from pipeline.stages import Job, Output
from pipeline.stages.train import copy_beside_weights, fresh
from pipeline.training.lora import merged
from pipeline.training.model import open_dense


def run(job: Job) -> Iterator[Output]:
    """Merge `job.inputs["adapter"]` into `job.inputs["base"]`, dense: one output, called tuned.

    Raise CheckpointError where the adapter belongs to another base, NonFinite where a merged weight is not finite.
    """
    base = open_dense(Checkpoint.open(job.inputs["base"]))
    folder = fresh(job.workspace / "out")
    shapes = {name: (info.dtype, info.shape) for name, info in base.tensors.items()}
    changed = 0
    with ShardReader(base) as reader, ShardWriter(folder, shapes) as writer:
        new = merged(base, job.inputs["adapter"], reader, trust_remote_code=job.trust_remote_code)
        upcoming = next(new, None)
        for done, (name, (dtype, _)) in enumerate(shapes.items(), start=1):
            if upcoming is not None and upcoming[0] == name:
                writer.write(name, upcoming[1].to(DTYPES[dtype]))
                upcoming = next(new, None)
                changed += 1
            else:
                writer.write(name, reader[name])
            progress.step("merge", done=done, total=len(shapes), unit="tensors")
    copy_beside_weights(base, folder)
    yield Output(variant="tuned", folder=folder, metrics={"merged_tensors": changed})
