"""One stage without a recipe: its outputs go to a folder of the user's instead of the store."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import child
from pipeline.errors import InputError, NonFinite
from pipeline.evaluation.tasks import ENVIRONMENT
from pipeline.execute import STAGES
from pipeline.jobs import Job
from pipeline.preloading import preload
from pipeline.sections import Data


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """An output in its place; `dropped` maps a source tensor to why it was left out, `agreement` is what was seen."""

    path: Path
    metrics: Mapping[str, float]
    dropped: Mapping[str, str]
    agreement: Mapping[str, float] | None = None


def run_by_hand(
    stage: str,
    destination: Path,
    *,
    inputs: Mapping[str, Path],
    options: Mapping[str, Any],
    data: Mapping[str, Data] | None = None,
    by_variant: bool,
    model_type: str,
    trust_remote_code: bool = False,
    verify: str | None = None,
) -> list[Moved]:
    """Run a stage in a child process and move its outputs to `destination`, or to a folder each under it.

    Raises InputError where the destination holds something, lies inside an input, or is being written by another run.
    `verify` is a text (empty: the built-in one) on which the logits of each output must be the source's, or
    ReloadMismatch is raised.
    Nothing half-done is left there: a run that was killed or interrupted leaves `.<destination>.work` beside it, and
    the same run goes on from it.
    """
    destination = destination.resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise InputError(f"{destination}: exists and is not empty; name a new folder")
    for path in inputs.values():
        if destination.is_relative_to(path.resolve()):
            raise InputError(f"{destination}: lies inside its input {path}; name a folder outside of it")
    with _workspace(destination) as workspace:
        job = Job(
            inputs=inputs, options=options, workspace=workspace, data=data or {}, trust_remote_code=trust_remote_code
        )
        return list(
            child.run(
                f"{__name__}:move", stage, job, destination, by_variant, verify,
                preload=preload(model_type, training=False), environment=ENVIRONMENT,
            )
        )  # fmt: skip


@contextlib.contextmanager
def _workspace(destination: Path) -> Iterator[Path]:
    """The folder beside `destination` that work is done in, held by one run; kept where going on makes sense."""
    workspace = destination.with_name(f".{destination.name}.work")
    workspace.mkdir(parents=True, exist_ok=True)
    handle = os.open(workspace, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(f"{destination}: another run is writing it; wait for it, or name another folder") from error
    try:
        yield workspace
        shutil.rmtree(workspace)
    except (InputError, NonFinite):  # the same input would end the same way
        shutil.rmtree(workspace)
        raise
    finally:
        os.close(handle)


def move(stage: str, job: Job, destination: Path, by_variant: bool, verify: str | None) -> list[Moved]:  # noqa: FBT001  # the child's body takes positions
    """Run a stage and move each output as it is finished; the body of the child process."""
    moved = []
    question = None
    if verify is not None:
        from pipeline.upcasting.agreement import TEXT, Question

        question = Question.ask(job.inputs["source"], text=verify or TEXT, trust_remote_code=job.trust_remote_code)
    for output in importlib.import_module(STAGES[stage]).run(job):
        agreement = question.compare(output.folder) if question else None
        place = destination / output.variant if by_variant else destination
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            place.rmdir()
        output.folder.rename(place)
        moved.append(
            Moved(
                path=place, metrics=output.metrics, dropped=output.notes.get("dropped", {}),
                agreement=asdict(agreement) if agreement else None,
            )
        )  # fmt: skip
    return moved
