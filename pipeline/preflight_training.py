"""Whether a method can train on what the recipe names: the base, the rows, the installed libraries."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pipeline import child
from pipeline.argument_names import HONOURED
from pipeline.catalog import format_of, format_to
from pipeline.checkpoint import Checkpoint
from pipeline.errors import DataError, MissingLibrary, RecipeError
from pipeline.launcher import read_launch
from pipeline.libraries import require_libraries
from pipeline.preloading import preload
from pipeline.recipe import Recipe
from pipeline.sections import LABELLED, Kind, Train
from pipeline.targets import BASE_TARGETS, AWQTarget, GPTQTarget, Target, is_mixed
from pipeline.trainability import Answer, refusal

# What a method learns from, where that is not everything.
ROWS_OF: Mapping[str, frozenset[Kind]] = {
    "head": frozenset({"classification", "regression", "tagged"}),
    "projector": frozenset({"classification", "regression", "pairs"}),
    **dict.fromkeys(("lora", "full", "qat"), frozenset(set(get_args(Kind)) - {"pairs"})),
}
# What transformers' quantizer is asked about a base that is not made yet.
BASE_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def check_training(recipe: Recipe, source: Checkpoint) -> None:
    """Raise RecipeError where method, base and engine do not go together, by what the installed libraries say."""
    train, quantization = recipe.train, source.quantization
    base = "dense" if train.base == "source" and quantization is None else train.base
    _check_options(recipe, base)
    if base in BASE_TARGETS and quantization is not None and format_to(BASE_TARGETS[base]) is format_of(quantization):
        raise RecipeError(f"train.base: the source is {base} already; use base source, or base dense")
    if base == "dense" and train.method not in {"projector", "lora"}:
        return
    title, raw = _quantized(base, source)
    answer = Answer()
    if raw is not None or train.method == "projector":
        # In a child: the libraries that know are the ones that the plan must not import.
        answer = child.run(
            "pipeline.trainability:ask",
            source.config,
            raw,
            recipe.trust_remote_code,
            preload=preload(source.model_type),
        )
    engine = train.resolved_engine
    reason = refusal(train.method, engine, format_title=title, base=base, arguments=train.arguments, answer=answer)
    if reason:
        raise RecipeError(reason)


def _check_options(recipe: Recipe, base: str) -> None:
    """Raise RecipeError for an option that the method, the base or the engine has no use for."""
    train = recipe.train
    launch = read_launch(train.launcher)
    if train.method == "qat":
        _check_grid(recipe.quantize)
    if train.resolved_engine == "features" and (foreign := sorted(train.arguments.keys() - HONOURED)):
        raise RecipeError(
            f"train.arguments: {foreign[0]} is Trainer's, the loop on features knows {', '.join(sorted(HONOURED))}; "
            "leave it out, or use engine trainer"
        )
    if train.resolved_engine == "features" and launch.fsdp:
        raise RecipeError(
            "train.launcher.config: FSDP shards a model that trains, and engine features has none; choose MULTI_GPU"
        )
    if train.merge_base != "dequantized" and base not in BASE_TARGETS:
        raise RecipeError(
            f"train.merge_base {train.merge_base}: with train.base {base} there are no weights but those trained on; "
            "leave it out, or use base nf4 or int8"
        )


def _quantized(base: str, source: Checkpoint) -> tuple[str, Mapping[str, Any] | None]:
    """What a quantized base is called, and its quantization_config; "" and None of a dense one.

    Raise RecipeError for a source that transformers does not load as it is.
    """
    if base in BASE_TARGETS:
        row = format_to(BASE_TARGETS[base])
        require_libraries(row)
        return row.title, BASE_CONFIGS[base]
    if base == "dense" or source.quantization is None:
        return "", None
    row = format_of(source.quantization)
    if not row.reload.startswith("transformers") or source.is_gguf:
        raise RecipeError(
            f"train.base source: transformers does not train on {row.title}; use base dense, which upcasts first"
        )
    if source.quantization.mixed:
        raise RecipeError(
            "train.base source: its modules have different bits (dynamic), which transformers does not load; use base "
            "dense, which upcasts first"
        )
    require_libraries(row)
    return row.title, source.quantization.raw


def check_kinds(train: Train, kinds: Mapping[str, Kind]) -> None:
    """Raise DataError where a method cannot learn from such rows, or is judged on rows of another kind."""
    learned, judged = kinds.get("train.data"), kinds.get("evaluate.data")
    fitting = ROWS_OF.get(train.method)
    if learned and fitting and learned not in fitting:
        raise DataError(
            f"train.data: holds {learned} rows, and method {train.method} learns from {' or '.join(sorted(fitting))}; "
            "name other rows or another method"
        )
    if train.packing and train.arguments.get("use_cache"):
        raise RecipeError("train.arguments: use_cache lets packed rows see each other; leave it out, or train.packing")
    if train.packing and learned in LABELLED:
        raise RecipeError(f"train.packing: is for conversations and prompts, the rows are {learned}; leave it out")
    expected = learned if learned in LABELLED else None
    if learned and judged and (judged if judged in LABELLED else None) != expected:
        raise DataError(
            f"evaluate.data: holds {judged} rows, but the model learns from {learned}; name rows of that kind"
        )


def _check_grid(targets: Sequence[Target]) -> None:
    """Raise RecipeError where torchao has no fake quantization for the first target's grid."""
    first = targets[0] if targets else None
    if not isinstance(first, GPTQTarget | AWQTarget):
        named = f"the first, {first.variant}, is not one" if first else "there is none"
        raise RecipeError(
            f"train.method qat trains for an integer grid: name a gptq or awq target first ({named}), or use full"
        )
    if is_mixed(first):
        raise RecipeError(
            f"train.method qat trains for one number of bits: {first.variant}, the first target, has bits auto; name "
            "one with bits as a number first, or use full"
        )
    if importlib.util.find_spec("torchao") is None:
        raise MissingLibrary("train.method qat needs torchao, which is not installed; run pip install 'requant[qat]'")
