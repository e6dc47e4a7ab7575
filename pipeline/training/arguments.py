"""TrainingArguments from the recipe's names, with what Requant decides itself filled in."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from pipeline.argument_names import RESERVED_ARGUMENTS
from pipeline.errors import RecipeError

# What a recipe may say otherwise. transformers' own: logging every 500 steps, NaN losses left out of the log, saving
# every 500 steps for ever; `save_strategy` "no" leaves saving to the clock (resume.Resumable).
DEFAULTS: Mapping[str, Any] = {
    "logging_steps": 10,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,
    "save_strategy": "no",
    "save_total_limit": 2,
    "dataloader_pin_memory": False,  # gains nothing for token ids, and warns on a machine without a GPU
}


def training_arguments(given: Mapping[str, Any], *, folder: Path, seed: int, mixed: bool) -> TrainingArguments:
    """TrainingArguments of the `given` names, verbatim; raise RecipeError for a value that they refuse.

    Resume files go to `folder`, all randomness comes from `seed`; `mixed` turns on bf16 autocast where the recipe says
    nothing of precision.
    """
    for name in given:
        assert name not in RESERVED_ARGUMENTS, f"{name}: the plan refuses it"
    values = {**DEFAULTS, "report_to": _reporters(given.get("report_to")), **given}
    if {"save_steps", "save_strategy"} & given.keys():
        values["save_strategy"] = given.get("save_strategy", "steps")
    if mixed and not {"bf16", "fp16", "use_cpu"} & given.keys():
        values["bf16"] = True
    fixed = {
        "output_dir": str(folder), "seed": seed, "data_seed": seed, "disable_tqdm": True, "do_train": True,
        "remove_unused_columns": False, "label_names": ["labels"],
    }  # fmt: skip
    try:
        return TrainingArguments(**(values | fixed))
    except (TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise RecipeError(f"train.arguments: {_sentence(error)}; correct the value") from error


def _reporters(given: Any) -> list[str]:
    """TensorBoard where it is installed; raise RecipeError where the recipe asks for one that is not."""
    if given is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    names = [given] if isinstance(given, str) else list(given)
    installed = get_available_reporting_integrations()
    for name in names:
        if name not in {*installed, "all", "none"}:
            raise RecipeError(
                f"train.arguments: report_to names {name}, which is not installed; choose from "
                f"{', '.join(sorted(installed)) or 'none here'}, or install it"
            )
    return names


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
