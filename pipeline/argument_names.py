"""The names that `train.arguments` and `train.lora` may hold, checked without importing what they belong to.

Importing transformers' and peft's classes takes seconds; the plan reads the same names off their source with `ast`.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import MissingLibrary, RecipeError
from pipeline.section import unknown_key

_NO_EVALUATION = "every epoch ends with the validation rows, and the evaluate section judges the result"
_NO_HUB = "a run sends nothing anywhere; push the finished artifact by hand"
_LAUNCHED = "it says how several processes train together; set train.launcher first"
RESERVED_ARGUMENTS: Mapping[str, str] = {
    "output_dir": "the run keeps its resume files in a workspace of its own",
    "seed": "the recipe's seed is used; set it at the top of the recipe",
    "data_seed": "the recipe's seed is used; set it at the top of the recipe",
    "disable_tqdm": "progress is shown by the command line",
    "resume_from_checkpoint": "a run resumes by itself",
    "ignore_data_skip": "a resumed run sees every row exactly as an uninterrupted one would",
    "save_only_model": "a run could not resume",
    "enable_jit_checkpoint": "it replaces the handler that ends a run",
    "remove_unused_columns": "rows arrive as token ids and labels, and nothing else",
    "label_names": "rows arrive as token ids and labels, and nothing else",
    "load_best_model_at_end": _NO_EVALUATION,
    "do_eval": _NO_EVALUATION,
    "do_predict": _NO_EVALUATION,
    "eval_strategy": _NO_EVALUATION,
    "eval_steps": _NO_EVALUATION,
    "eval_on_start": _NO_EVALUATION,
    "push_to_hub": _NO_HUB,
    "hub_token": _NO_HUB,
    "hub_model_id": _NO_HUB,
    "hub_strategy": _NO_HUB,
    "hub_always_push": _NO_HUB,
    "hub_private_repo": _NO_HUB,
    "hub_revision": _NO_HUB,
    "auto_find_batch_size": "where memory runs out, a run takes fewer rows at a time and keeps the rows of an update",
    "deepspeed": "its checkpoints cannot be resumed by digest; use FSDP, by train.launcher.config",
    "parallelism_config": "processes share rows, not layers; use FSDP, by train.launcher.config",
    "local_rank": "each process is told by the launcher which it is",
}
# Names that mean something only where a launcher starts several processes.
LAUNCHED_ARGUMENTS: Mapping[str, str] = {"fsdp": _LAUNCHED, "fsdp_config": _LAUNCHED}
# transformers takes true too, whatever its annotation says.
_WIDER = {"fsdp": "bool | str | None"}
# What the loop on cached features (training/feature_loop.py) heeds; the other names are for Trainer.
HONOURED: frozenset[str] = frozenset({
    "adam_beta1", "adam_beta2", "adam_epsilon", "dataloader_drop_last", "gradient_accumulation_steps", "learning_rate",
    "logging_first_step", "logging_steps", "logging_strategy", "lr_scheduler_kwargs", "lr_scheduler_type",
    "max_grad_norm", "max_steps", "num_train_epochs", "per_device_eval_batch_size", "per_device_train_batch_size",
    "save_steps", "save_strategy", "save_total_limit", "use_cpu", "warmup_steps", "weight_decay",
})  # fmt: skip
_CAUSAL = "Requant trains causal language models and fills it in"
_UNMERGEABLE = "such an adapter cannot be merged into its base"
RESERVED_LORA: Mapping[str, str] = {
    "task_type": _CAUSAL,
    "peft_type": _CAUSAL,
    "peft_version": _CAUSAL,
    "auto_mapping": _CAUSAL,
    "inference_mode": _CAUSAL,
    "base_model_name_or_path": "the adapter's base is the stage's input; a path in it would change its digest",
    "revision": "the adapter's base is the stage's input",
    "runtime_config": "it is no part of an adapter",
    "alora_invocation_tokens": _UNMERGEABLE,
    "arrow_config": _UNMERGEABLE,
    "layer_replication": _UNMERGEABLE,
    "megatron_config": _UNMERGEABLE,
    "monteclora_config": _UNMERGEABLE,
    "target_parameters": _UNMERGEABLE,
    "trainable_token_indices": _UNMERGEABLE,
    "use_bdlora": _UNMERGEABLE,
    "velora_config": _UNMERGEABLE,
    "kasa_config": "it changes the base weights, so the adapter would not fit the base it is merged into",
}
# Other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base weights, or want data of their own (EVA).
LORA_INITS = (True, False, "gaussian", "orthogonal")


_TYPES: Mapping[str, tuple[tuple[type, ...], str]] = {
    "float": ((int, float), "a number"),
    "int": ((int,), "a whole number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "text"),
    "None": ((type(None),), "null"),
}


def check_arguments(arguments: Mapping[str, Any], lora: Mapping[str, Any], *, launched: bool = False) -> None:
    """Raise RecipeError for the first name that neither library has or that Requant keeps, or value of a wrong type.

    `launched` says whether train.launcher starts processes, of which some arguments speak.
    """
    reserved = RESERVED_ARGUMENTS if launched else {**RESERVED_ARGUMENTS, **LAUNCHED_ARGUMENTS}
    _check_fields("train.arguments", arguments, reserved, training_argument_types)
    _check_fields("train.lora", lora, RESERVED_LORA, lora_types)
    if lora.get("bias", "none") != "none":
        raise RecipeError(f"train.lora: bias is {lora['bias']!r}, which no merge undoes; use none")
    initial = lora.get("init_lora_weights", True)
    if not any(initial is valid or (isinstance(valid, str) and initial == valid) for valid in LORA_INITS):
        raise RecipeError(
            f"train.lora: init_lora_weights is {initial!r}, which changes the base weights or needs data of its own; "
            "use true, false, gaussian or orthogonal"
        )


def training_argument_types() -> dict[str, str]:
    """The fields of the installed transformers' TrainingArguments: name → annotation, as written."""
    return _fields(_package("transformers") / "training_args.py", "TrainingArguments")


def lora_types() -> dict[str, str]:
    """The fields of the installed peft's LoraConfig, those of its bases among them: name → annotation, as written."""
    peft = _package("peft")
    bases = _fields(peft / "config.py", "PeftConfigMixin") | _fields(peft / "config.py", "PeftConfig")
    return bases | _fields(peft / "tuners" / "lora" / "config.py", "LoraConfig")


def _check_fields(
    section: str, given: Mapping[str, Any], reserved: Mapping[str, str], types: Callable[[], Mapping[str, str]]
) -> None:
    valid = types() if given else {}
    for name, value in given.items():
        if name in reserved:
            raise RecipeError(f"{section}: {name} cannot be set: {reserved[name]}; leave it out")
        if name not in valid:
            raise RecipeError(f"{section}: {unknown_key(str(name), valid.keys() - reserved.keys())}")
        if expected := _expected(_WIDER.get(name, valid[name]), value):
            raise RecipeError(f"{section}: {name} is {value!r}, expected {expected}")


def _expected(annotation: str, value: Any) -> str:
    """What a value of `annotation` looks like where `value` is none, or nothing; a library's class takes any value."""
    parts = [part.strip() for part in annotation.split("|")]
    if not all(part in _TYPES for part in parts):
        return ""
    for part in parts:
        kinds, _ = _TYPES[part]
        if isinstance(value, kinds) and (part == "bool" or not isinstance(value, bool)):
            return ""
    return " or ".join(_TYPES[part][1] for part in parts)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # of a top-level package: finds it without running it
    if spec is None or spec.origin is None:
        raise MissingLibrary(f"training needs {name}, which is not installed; run pip install requant")
    return Path(spec.origin).parent


def _fields(path: Path, name: str) -> dict[str, str]:
    """The annotated fields of the class `name` in a source file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {
                item.target.id: ast.unparse(item.annotation)
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            }
    raise AssertionError(f"{path} has no class {name}")
