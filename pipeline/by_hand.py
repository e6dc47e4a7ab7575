"""One stage without a recipe: its outputs go to a folder of the user's instead of the store."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import child
from pipeline.errors import InputError, NonFinite
from pipeline.execute import STAGES, preload
from pipeline.recipe import Data
from pipeline.stages import Job


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
) -> list[Path]:
    """Run a stage in a child process and move its outputs to `destination`, or to a folder each under it.

    Raises InputError where the destination holds something, lies inside an input, or is being written by another run.
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
        return list(child.run(f"{__name__}:move", stage, job, destination, by_variant, preload=preload(model_type)))


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


def move(stage: str, job: Job, destination: Path, by_variant: bool) -> list[Path]:  # noqa: FBT001  # the child's body takes positions
    """Run a stage and move each output as it is finished; the body of the child process."""
    moved = []
    for output in importlib.import_module(STAGES[stage]).run(job):
        place = destination / output.variant if by_variant else destination
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            place.rmdir()
        output.folder.rename(place)
        moved.append(place)
    return moved
