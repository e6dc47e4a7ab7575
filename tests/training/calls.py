"""What launched processes are asked to do, for the tests of the launcher."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState

from pipeline import progress
from pipeline.errors import RecipeError
from pipeline.stages import train
from pipeline.training import processes, trainer
from pipeline.training.watching import Meter
from tests.training import small


def meet(request):
    """Join the others, say something, and answer with what each process knows."""
    PartialState(cpu=True)
    progress.step("meet", done=1, total=2, unit="rows")
    progress.metric("meet", "loss", 0.5)
    progress.message("meet", f"process {os.environ['RANK']} of {processes.count()}")
    sys.stdout.write("this goes nowhere")
    return {
        "request": request, "count": processes.count(), "main": processes.is_main(),
        "from_main": processes.from_main(int(os.environ["RANK"]) + 7),
        "anywhere": processes.anywhere([processes.is_main(), not processes.is_main(), False]),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def refuse(request):
    """The second process refuses; the first waits for it."""
    if int(os.environ["RANK"]) == request["rank"]:
        raise RecipeError("train.lora: r is 0; correct the value")
    time.sleep(600)


def divide(_):
    sys.stdout.write("about to divide")
    return 1 / 0


def die(_):
    """The second process is killed while the first waits for it."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def leave_a_note(request):
    """Write which process this is, then wait to be killed."""
    Path(request["folder"], os.environ.get("RANK", "0")).write_text(f"{os.getpid()} {os.getppid()}")
    progress.message("wait", "here")
    time.sleep(600)


def train_small(request):
    """Train the small model, and answer with its weights."""
    given = {"per_device_train_batch_size": 2, "use_cpu": True, "optim": "sgd", "learning_rate": 0.1}
    trained = small.run(Path(request["folder"]), given=given)
    return {name: tensor.tolist() for name, tensor in trained.model.state_dict().items()}


def short_of_memory(job):
    """Train, where the second process can take only so many rows at a time."""
    most = int(os.environ["REQUANT_TEST_MOST_ROWS"])

    class Short(Meter):
        def count(self, batch):
            super().count(batch)
            if not processes.is_main() and len(batch["input_ids"]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.Meter = Short
    yield from train.run_here(job)
