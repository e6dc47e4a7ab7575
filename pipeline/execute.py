"""One step of a plan: space checked, workspace held, stage run in a child process, outputs committed as they finish."""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import child, progress
from pipeline.artifacts import Artifact, Store
from pipeline.digests import digest_value
from pipeline.errors import NoSpace
from pipeline.evaluation.tasks import ENVIRONMENT
from pipeline.jobs import Job
from pipeline.manifest import Origin
from pipeline.plan import Plan
from pipeline.preloading import preload
from pipeline.sections import Launcher
from pipeline.steps import Step

STAGES = {
    "upcast": "pipeline.stages.upcast",
    "train": "pipeline.stages.train",
    "merge": "pipeline.stages.merge",
    "quantize": "pipeline.stages.quantize",
    "evaluate": "pipeline.stages.evaluate",
}
# Under the store's root: features of frozen backbones, which any later run may use, and what TensorBoard reads.
FEATURES, LOGS = ".store/features", ".store/logs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a child is sent: a stage's job, and what to commit its outputs as.

    `only` is what the plan calls a step's only output, whatever the stage does: an upcast makes `dense`, and also
    `dequantized`.
    """

    stage: str
    only: str | None
    job: Job
    store: Path
    name: str
    origins: Mapping[str, Origin]
    parents: Mapping[str, Mapping[str, str]]


def run_step(plan: Plan, step: Step, *, isolated: bool = True) -> dict[str, Artifact]:
    """Run what is pending of a step; return its artifacts by variant. `isolated` runs the stage in a child process."""
    found = {output.variant: output.artifact for output in step.outputs if output.artifact}
    if step.pending:
        check_space(plan.store.root, step)
        for variant, reference in _run(plan, step, isolated=isolated).items():
            found[variant] = plan.store.resolve(reference)
    return found


def check_space(root: Path, step: Step) -> None:
    """Raise NoSpace unless the disk holds what the step will write."""
    existing = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < step.needs.disk:
        raise NoSpace(
            f"{step.stage}: needs {step.needs.disk / 1e9:.2f} GB on {existing}, {free / 1e9:.2f} GB are free; "
            "free some with requant artifacts gc --keep 1, or name another store"
        )


def work(task: Work) -> dict[str, str]:
    """Run a stage and commit each output as it comes; the body of the child process. Returns variant → reference."""
    stage = importlib.import_module(STAGES[task.stage])
    store = Store(task.store)
    committed: dict[str, str] = {}
    started = time.monotonic()
    for output in stage.run(task.job):
        variant = task.only or output.variant
        artifact = store.commit(
            output.folder,
            name=task.name,
            variant=variant,
            origin=task.origins[variant],
            parents={role: task.parents[role] for role in task.origins[variant].parents},
            metrics={**output.metrics, "seconds": round(time.monotonic() - started, 3)},
            notes=output.notes,
        )
        progress.message(task.stage, f"committed {artifact.reference}")
        committed[variant] = artifact.reference
        started = time.monotonic()
    return committed


def _run(plan: Plan, step: Step, *, isolated: bool) -> dict[str, str]:
    # Of all outputs, not of those still pending: a run that was killed after the first finds the same workspace again.
    identity = digest_value([output.origin.fingerprint for output in step.outputs])
    with plan.store.workspace(identity) as workspace:
        task = _task(plan, step, workspace)
        if not task.origins:  # another run made them while this one waited for the workspace
            return {
                output.variant: artifact.reference for output in step.pending if (artifact := plan.artifact(output))
            }
        if not isolated:
            return work(task)
        done: dict[str, str] = child.run(
            "pipeline.execute:work", task, preload=preload(plan.source.model_type), environment=ENVIRONMENT
        )
        return done


def _task(plan: Plan, step: Step, workspace: Path) -> Work:
    name = plan.recipe.name
    origins = {output.variant: output.origin for output in step.pending if plan.artifact(output) is None}
    inputs: dict[str, Path] = {}
    parents: dict[str, dict[str, str]] = {}
    needed = {role for origin in origins.values() for role in origin.parents}
    for role, parent in ((role, parent) for role, parent in step.inputs.items() if role in needed):
        if parent == "source":
            digest = plan.source_digest
            inputs[role] = plan.source.path.absolute()  # a link of the hub leads to a blob without a suffix
            parents[role] = {"reference": plan.recipe.source, "fingerprint": digest, "digest": digest}
            continue
        artifact = plan.made(parent)
        assert artifact, f"{parent} is needed before it was made"
        inputs[role] = artifact.path
        manifest = artifact.manifest
        parents[role] = {
            "reference": artifact.reference, "fingerprint": manifest.fingerprint, "digest": manifest.digest
        }  # fmt: skip
    options = dict(step.options)
    if step.targets:
        options["targets"] = [target.model_dump() for target in step.targets if target.variant in origins]
    job = Job(
        inputs=inputs,
        options=options,
        workspace=workspace,
        cache=plan.store.root / FEATURES,
        logs=plan.store.root / LOGS / name / workspace.name,
        launcher=_launcher(plan.recipe.train.launcher),
        data=step.data,
        donors={output.variant: plan.donors(step, output) for output in step.pending if step.targets},
        trust_remote_code=plan.recipe.trust_remote_code,
    )
    only = step.outputs[0].variant if len(step.outputs) == 1 else None
    return Work(
        stage=step.stage, only=only, job=job, store=plan.store.root, name=name, origins=origins, parents=parents
    )


def _launcher(given: Launcher) -> Launcher:
    """The same, by a path that holds wherever the child is."""
    return given.model_copy(update={"config": str(Path(given.config).absolute())}) if given.config else given
