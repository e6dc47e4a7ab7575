"""How many processes train, and what accelerate is told of them, read without importing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import RecipeError
from pipeline.sections import Launcher

# accelerate's kinds of machine whose processes Requant can start, resume and write the result of.
_KINDS = frozenset({"NO", "MULTI_CPU", "MULTI_GPU", "FSDP"})
_ELSEWHERE: Mapping[str, str] = {
    "deepspeed_config": "DeepSpeed's checkpoints cannot be resumed by digest; choose FSDP",
    "megatron_lm_config": "Megatron-LM brings its own loop; choose FSDP",
    "parallelism_config": "the processes share rows, not layers; choose FSDP",
    "mpirun_config": "the processes are started by torch; leave it out",
    "dynamo_config": "compiling is train.arguments' business; set torch_compile there",
    "fp8_config": "precision is train.arguments' business; set bf16 there",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """Processes on this machine, whether FSDP shards the model among them, and the config file that says how."""

    processes: int
    fsdp: bool = False
    config: Path | None = None


def read_launch(launcher: Launcher) -> Launch:
    """The launcher's settings with those of its config file; raise RecipeError for what cannot be launched."""
    if launcher.config is None:
        return Launch(processes=launcher.processes)
    path = Path(launcher.config)
    values = _read(path)
    where = f"train.launcher.config: {path}"
    kind = str(values.get("distributed_type", "NO"))
    if values.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise RecipeError(f"{where} is for {values['compute_environment']}; write one for LOCAL_MACHINE")
    if kind not in _KINDS:
        raise RecipeError(f"{where} has distributed_type {kind}; choose from {', '.join(sorted(_KINDS))}")
    for key, reason in _ELSEWHERE.items():
        if values.get(key):
            raise RecipeError(f"{where} has {key}: {reason}")
    machines = values.get("num_machines", 1)
    if machines != 1:
        raise RecipeError(f"{where} has num_machines {machines}, but the store is a folder of one machine; set it to 1")
    precision = values.get("mixed_precision") or "no"
    if precision != "no":
        raise RecipeError(f"{where} has mixed_precision {precision}; set train.arguments.{precision}: true instead")
    return Launch(processes=_processes(launcher, values, where), fsdp=kind == "FSDP", config=path.absolute())


def _processes(launcher: Launcher, values: Mapping[str, Any], where: str) -> int:
    """The recipe's number of processes, or the file's where the recipe gives none."""
    named = values.get("num_processes")
    if named is not None and (not isinstance(named, int) or named < 1):
        raise RecipeError(f"{where} has num_processes {named}, expected a whole number of at least 1")
    if named is not None and launcher.processes not in {1, named}:
        raise RecipeError(
            f"{where} has num_processes {named}, but train.launcher.processes is {launcher.processes}; give one of them"
        )
    return named or launcher.processes


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"train.launcher.config: {path}: {error.strerror}; run accelerate config to make one"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"train.launcher.config: {path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise RecipeError(f"train.launcher.config: {path} holds no keys; run accelerate config to make one")
    return values
