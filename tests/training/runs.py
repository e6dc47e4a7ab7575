"""A small training job, for the tests of both stages."""

from __future__ import annotations

import json

import torch

from pipeline import progress
from pipeline.jobs import Job
from pipeline.sections import Data, Launcher
from pipeline.stages import train

ARGUMENTS = {"max_steps": 6, "learning_rate": 5e-3, "per_device_train_batch_size": 2, "save_steps": 2}
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}


def rows(path, count=60):
    """A JSONL file of documents with something to learn."""
    path.write_text("".join(json.dumps({"text": f"in the end there are {i} of them"}) + "\n" for i in range(count)))
    return Data(path=str(path))


def training_job(base, workspace, *, method="lora", lora=None, data=None, seed=5, launcher=None, **arguments):
    """Six steps on sequences of 32 tokens."""
    workspace.mkdir(parents=True, exist_ok=True)
    options = {
        "method": method, "sequence_length": 32, "lora": lora or LORA, "arguments": ARGUMENTS | arguments, "seed": seed,
    }  # fmt: skip
    data = data or rows(workspace / "rows.jsonl")
    processes = Launcher.model_validate(launcher or {})
    return Job(
        inputs={"base": base}, options=options, workspace=workspace, data={"train": data}, launcher=processes
    )  # fmt: skip


def trained(base, workspace, **options):
    """The job's one output, trained on one thread: a model this small spends more on waiting for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        [output] = train.run(training_job(base, workspace, **options))
    finally:
        torch.set_num_threads(threads)
    return output


class Killed(Exception):
    """Stands for whatever ends a run in its middle."""


def dies_at(step):
    """A sink that ends the run after a step."""

    def sink(event):
        if isinstance(event, progress.Step) and event.done == step:
            raise Killed

    return sink


def contents(folder):
    """File → its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
