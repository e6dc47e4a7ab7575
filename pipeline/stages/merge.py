"""Merge: what was trained joins the weights that the recipe goes on from.

An adapter is folded in: what it does not touch is copied byte for byte; what it touches is merged in float32 and
rounded once, to the dtype it had. Names, shapes, dtypes and order are the base's; memory is bounded by the adapter and
one tensor. A head takes its place in the architecture, a projector lies beside its backbone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline import progress
from pipeline.checkpoint import Checkpoint, copy_companions
from pipeline.companions import PROJECTOR
from pipeline.encoding import load_tokenizer
from pipeline.evaluation.load import load_model
from pipeline.jobs import Job, Output, fresh
from pipeline.shard_writer import ShardWriter
from pipeline.shards import DTYPES, ShardReader
from pipeline.training import head, lora
from pipeline.training.examples import mean_loss, read_examples
from pipeline.training.model import open_dense
from pipeline.training.projected import lay_beside
from pipeline.training.task import Task, write_config


def run(job: Job) -> Iterator[Output]:
    """Join `job.inputs["adapter"]`, `["head"]` or `["projector"]` to `job.inputs["base"]`: one output, called tuned.

    With `job.inputs["original"]` an adapter is merged into both, and the one with the lower loss on
    `job.data["validation"]` stays. Raise CheckpointError where the two do not belong together, NonFinite where a merged
    weight is not finite.
    """
    base = Checkpoint.open(job.inputs["base"])
    if "original" in job.inputs:
        yield _better(job)
    elif "adapter" in job.inputs:
        folder = fresh(job.workspace / "out")
        changed = _merge(open_dense(base), job.inputs["adapter"], folder, trust_remote_code=job.trust_remote_code)
        yield Output(variant="tuned", folder=folder, metrics={"merged_tensors": changed})
    else:
        folder = fresh(job.workspace / "out")
        if "head" in job.inputs:
            head.merge_head(base, job.inputs["head"], folder)
        else:
            lay_beside(base, job.inputs["projector"], folder)
        yield Output(variant="tuned", folder=folder)


def _better(job: Job) -> Output:
    """The adapter merged into both bases; the one with the lower loss."""
    losses: dict[str, float] = {}
    changed = 0
    for role, name in (("base", "dequantized"), ("original", "original")):
        folder = fresh(job.workspace / name)
        base = open_dense(Checkpoint.open(job.inputs[role]))
        changed = _merge(base, job.inputs["adapter"], folder, trust_remote_code=job.trust_remote_code)
        losses[name] = _loss(job, folder)
    won = min(losses, key=lambda name: losses[name])
    said = ", ".join(f"{name} {loss:.6g}" for name, loss in losses.items())
    progress.message("merge", f"the adapter is better on the {won} weights (validation loss: {said})")
    out = fresh(job.workspace / "out")
    out.rmdir()
    return Output(
        variant="tuned", folder=(job.workspace / won).rename(out),
        metrics={"merged_tensors": changed, **{f"validation_loss_{name}": loss for name, loss in losses.items()}},
        notes={"merge_base": won},
    )  # fmt: skip


def _loss(job: Job, folder: Path) -> float:
    """The mean loss of a merged model on the validation rows."""
    task = Task.read(job.inputs["adapter"])
    tokenizer = load_tokenizer(folder, trust_remote_code=job.trust_remote_code)
    examples = read_examples(job, "validation", task, tokenizer)
    model = load_model(folder, model_class=task.model_class, trust_remote_code=job.trust_remote_code)
    return mean_loss(model, examples)


def _merge(base: Checkpoint, adapter: Path, folder: Path, *, trust_remote_code: bool) -> int:
    """Write the merged checkpoint to `folder`; return how many tensors the adapter changed."""
    task = Task.read(adapter)
    shapes = {
        name: (info.dtype, info.shape)
        for name, info in base.tensors.items()
        if name.rpartition(".")[0] not in task.dropped
    }
    shapes |= lora.new_shapes(base, adapter)
    changed = 0
    with ShardReader(base) as reader, ShardWriter(folder, shapes) as writer:
        new = lora.merged(base, adapter, reader, trust_remote_code=trust_remote_code)
        upcoming = next(new, None)
        for done, (name, (dtype, _)) in enumerate(shapes.items(), start=1):
            if upcoming is not None and upcoming[0] == name:
                writer.write(name, upcoming[1].to(DTYPES[dtype]))
                upcoming = next(new, None)
                changed += 1
            else:
                writer.write(name, reader[name])
            progress.step("merge", done=done, total=len(shapes), unit="tensors")
    write_config(base, task, folder)
    copy_companions(base.path, folder, but=PROJECTOR)
    return changed
