"""What is checked before a plan is made: the source, the libraries, the groups, the argument names, the rows."""

from __future__ import annotations

from pathlib import Path

from pipeline.argument_names import check_arguments
from pipeline.artifacts import REFERENCE, VERSION, Store
from pipeline.bit_budget import check_budget
from pipeline.catalog import FORMATS
from pipeline.checkpoint import Checkpoint
from pipeline.errors import DataError, UnsupportedFormat
from pipeline.gguf_files import is_gguf
from pipeline.libraries import require_for, require_libraries
from pipeline.model_task import kind_for, task_of
from pipeline.preflight_training import check_kinds, check_training
from pipeline.recipe import Recipe
from pipeline.reloadable import check_reload
from pipeline.rows import check_rows, lacks_chat_template
from pipeline.sections import LABELLED, Kind
from pipeline.sizes import Sizes, check_target
from pipeline.sources import open_source
from pipeline.target_layout import check_grid
from pipeline.targets import GGUFTarget

ROWS_CHECKED = 1000  # the plan looks at the first rows; the stage at all of them


def open_model(source: str, store: Store) -> Checkpoint:
    """The checkpoint behind a folder, a GGUF file, a store reference, or a hub id[@revision]."""
    match = None if Path(source).is_dir() or is_gguf(Path(source)) else REFERENCE.fullmatch(source)
    if match and (store.versions(match["name"], match["variant"]) or VERSION.fullmatch(match["which"] or "")):
        return Checkpoint.open(store.resolve(source).path)
    return open_source(source)


def check(recipe: Recipe, source: Checkpoint, sizes: Sizes) -> Kind | None:
    """Raise an InputError for the first thing in a recipe that is known to fail, before any of it is paid for.

    Returns what the training rows are.
    """
    if source.is_gguf:  # the one format that is read with its own library
        require_libraries(FORMATS["gguf"])
    for target in recipe.quantize:
        require_for(target)
        check_reload(source, sizes, target)
        check_target(sizes, target)
        check_budget(sizes, target)
        check_grid(target, source)
    if recipe.train.method != "none":
        check_arguments(recipe.train.arguments, recipe.train.lora, launched=recipe.train.launcher.several)
        check_training(recipe, source)
    files = {"train.data": recipe.train.data if recipe.train.method != "none" else None}
    if recipe.train.method != "none" and recipe.train.data and recipe.train.data.validation:
        files["train.data, the part validation"] = recipe.train.data.model_copy(update={"part": "validation"})
    several = len(recipe.calibration_rows) > 1
    for i, rows in enumerate(recipe.calibration_rows.values()):
        files[f"calibration.data.{i}" if several else "calibration.data"] = rows
    files["evaluate.data"] = recipe.evaluation_data
    kinds = {key: check_rows(data, limit=ROWS_CHECKED) for key, data in files.items() if data}
    if "messages" in kinds.values() and _lacks_chat_template(source):
        key = next(key for key, kind in kinds.items() if kind == "messages")
        raise DataError(f"{key}: holds messages, but the tokenizer of {source.path} has no chat template")
    check_kinds(recipe.train, kinds)
    _check_heads(recipe, kinds.get("train.data"))
    if recipe.train.method == "none" and recipe.evaluation_data and not source.is_gguf:
        kind_for(task_of(source.folder), kinds["evaluate.data"], data=recipe.evaluation_data, named=recipe.source)
    return kinds.get("train.data")


def _check_heads(recipe: Recipe, learned: Kind | None) -> None:
    """Raise UnsupportedFormat for a target without a place for what training puts on the model."""
    for target in recipe.quantize:
        if isinstance(target, GGUFTarget) and (learned in LABELLED or recipe.train.method == "projector"):
            raise UnsupportedFormat(
                f"{target.variant}: the head or projector that learns from {learned} rows has no place in a GGUF file; "
                "quantize to bitsandbytes, GPTQ or AWQ"
            )


def _lacks_chat_template(source: Checkpoint) -> bool:
    if source.is_gguf:
        return not (source.quantization and source.quantization.raw["chat_template"])
    return lacks_chat_template(source.path)
