"""One call in several processes, started by `accelerate launch`.

The call goes out as a JSON file; its result, its events and its errors come back as lines of JSON over a Unix socket
in the kernel's abstract namespace, whose peers must be this user's. torch starts each process in a session of its own,
out of reach of whoever ends this one's group; a second connection is their lifeline instead (worker.py): it closes with
this process, however that ends, and the kernel then kills each of them.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from pipeline.cgroup import cores, oom_kills
from pipeline.child import GRACE, TAIL
from pipeline.errors import RecipeError, RequantError
from pipeline.launcher import Launch
from pipeline.training.answers import Answers

WORKER = "pipeline.training.worker"


def launch(function: str, request: Mapping[str, Any], *, settings: Launch, folder: Path, cpu: bool = False) -> Any:
    """The result that `module:function`, called with `request` in each of the processes, has in the main one.

    Request and result are JSON. The main process's events are emitted here. `cpu` keeps the processes off the GPUs;
    without one they are on CPUs anyway, over gloo. Files of the call itself go to `folder`.

    Raise the first RequantError of any process; StageFailed for any other exception; OutOfMemory where the kernel
    killed one for memory, StageDied where one ended without a word otherwise; RecipeError for processes that lack
    a GPU.
    """
    cpu = cpu or not torch.cuda.is_available()
    _check_devices(settings, cpu=cpu)
    folder.mkdir(parents=True, exist_ok=True)
    call = folder / "call.json"
    call.write_text(json.dumps({"function": function, "request": request}), encoding="utf-8")
    kills = oom_kills()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, tempfile.TemporaryFile() as output:
        name = f"requant-{secrets.token_hex(16)}"
        listener.bind(f"\0{name}")
        listener.listen(2 * settings.processes)
        started = subprocess.Popen(
            [*_command(settings, folder, cpu=cpu), name, str(call)],
            env=_environment(settings, cpu=cpu), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
        answers = Answers(listener, settings.processes)
        try:
            result = answers.listen(lambda: started.poll() is None, lambda: oom_kills() - kills)
            _wait(started)
        except RequantError as error:
            answers.close()
            _wait(started)
            if said := _tail(output):
                error.add_note(f"The last output of the processes:\n{said}")
            raise
        finally:
            answers.close()  # the kernel kills each process for it
            started.kill()
            started.wait()
    return result


def _check_devices(settings: Launch, *, cpu: bool) -> None:
    if settings.fsdp and cpu:
        raise RecipeError(
            "train.launcher.config: accelerate shards a model (FSDP) only among GPUs, and none is used here; choose "
            "distributed_type MULTI_CPU"
        )
    if not cpu and settings.processes > (devices := torch.cuda.device_count()):
        raise RecipeError(
            f"train.launcher: {settings.processes} processes need a GPU each, and {devices} is here; lower "
            "train.launcher.processes, or set train.arguments.use_cpu"
        )


def _command(settings: Launch, folder: Path, *, cpu: bool) -> list[str]:
    """`accelerate launch` of the worker. Without a config file it would read the one in the user's home."""
    config = settings.config or folder / "accelerate.yaml"
    together = settings.processes > 1 and not settings.fsdp
    if settings.config is None:
        values = {
            "compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU" if together else "NO",
            "num_machines": 1, "num_processes": settings.processes, "mixed_precision": "no", "use_cpu": cpu,
        }  # fmt: skip
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_machines", "1",
        "--num_processes", str(settings.processes), "--main_process_port", "0",
    ]  # fmt: skip
    # Said of CPUs too: accelerate starts those by MPI alone, and torch's own launcher, behind this flag, does it for
    # both. Which device it is to be, the environment says.
    return [*command, *(["--multi_gpu"] if together else []), "--module", WORKER]


def _environment(settings: Launch, *, cpu: bool) -> dict[str, str]:
    """This process's, in which the processes find this very code and share the cores."""
    found = dict(os.environ)
    root = str(Path(__file__).parents[2])
    found["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    found.setdefault("OMP_NUM_THREADS", str(max(1, cores() // settings.processes)))
    if cpu:
        found["ACCELERATE_USE_CPU"] = "true"
    return found


def _wait(started: subprocess.Popen[bytes]) -> None:
    """Give the launcher time to end by itself."""
    try:
        started.wait(GRACE)
    except subprocess.TimeoutExpired:
        started.kill()


def _tail(output: IO[bytes]) -> str:
    """The last bytes that the processes printed."""
    end = os.fstat(output.fileno()).st_size
    return os.pread(output.fileno(), TAIL, max(0, end - TAIL)).decode(errors="replace").strip()
