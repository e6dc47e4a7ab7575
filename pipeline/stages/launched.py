"""A stage in several processes: its job goes out as JSON, the main process's outputs come back as JSON."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import progress
from pipeline.errors import OutOfMemory
from pipeline.jobs import Job, Output
from pipeline.launcher import Launch, read_launch
from pipeline.sections import Data
from pipeline.training.launch import launch
from pipeline.training.memory import known_micro_batch


def is_launched(job: Job) -> bool:
    """Whether the job's launcher asks for processes beside this one, or names an accelerate config."""
    return job.launcher.several


def run_launched(function: str, job: Job) -> Iterator[Output]:
    """What `module:function`, a stage's body, yields for the job in the main one of its processes.

    Where a process ran out of memory and left a smaller micro-batch behind, they are all started again.
    """
    settings = read_launch(job.launcher)
    checkpoints = job.workspace / "checkpoints"
    request = {"function": function, "job": _as_json(job)}
    while True:
        before = known_micro_batch(checkpoints)
        try:
            outputs = _launch(settings, request, job)
            break
        except OutOfMemory:
            smaller = known_micro_batch(checkpoints)
            if smaller == before:
                raise
        progress.message("train", f"out of memory in one of the processes; all start again with {smaller}")
    for output in outputs:
        yield Output(**{**output, "folder": Path(output["folder"])})


def work(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The other side: run the stage's body in each process; what the main one yields, as JSON."""
    module, _, name = request["function"].partition(":")
    body = getattr(importlib.import_module(module), name)
    outputs = [asdict(output) for output in body(_from_json(request["job"]))]
    return [{**output, "folder": str(output["folder"])} for output in outputs]


def _launch(settings: Launch, request: Mapping[str, Any], job: Job) -> list[dict[str, Any]]:
    cpu = bool(job.options["arguments"].get("use_cpu"))
    outputs: list[dict[str, Any]] = launch(
        "pipeline.stages.launched:work", request, settings=settings, folder=job.workspace, cpu=cpu
    )
    return outputs


def _as_json(job: Job) -> dict[str, Any]:
    return {
        "inputs": {role: str(path) for role, path in job.inputs.items()},
        "options": dict(job.options),
        "workspace": str(job.workspace),
        "cache": str(job.cache) if job.cache else None,
        "logs": str(job.logs) if job.logs else None,
        "data": {role: data.model_dump(mode="json") for role, data in job.data.items()},
        "trust_remote_code": job.trust_remote_code,
    }


def _from_json(sent: Mapping[str, Any]) -> Job:
    return Job(
        inputs={role: Path(path) for role, path in sent["inputs"].items()},
        options=sent["options"],
        workspace=Path(sent["workspace"]),
        cache=Path(sent["cache"]) if sent["cache"] else None,
        logs=Path(sent["logs"]) if sent["logs"] else None,
        data={role: Data.model_validate(data) for role, data in sent["data"].items()},
        trust_remote_code=sent["trust_remote_code"],
    )
