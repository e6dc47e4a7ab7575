"""Which class of transformers a checkpoint's config.json names, to build the model with and to load it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args

from pipeline.checkpoint import architecture_of


def class_of(config: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
    """The class that comes first in `architectures`, or else AutoModelForCausalLM.

    A model that brings its own code, where that is trusted, gives the auto class under which its auto_map has it.
    """
    import transformers

    name = architecture_of(config)
    auto_map = config.get("auto_map")
    if trust_remote_code and isinstance(auto_map, dict):
        for auto, place in auto_map.items():
            if auto.startswith("AutoModel") and str(place).rpartition(".")[2] == name and hasattr(transformers, auto):
                return getattr(transformers, auto)
    named = getattr(transformers, name, None)
    base = transformers.PreTrainedModel  # never built itself: it would keep, for every class, what it finds of its own
    if isinstance(named, type) and issubclass(named, base) and named is not base:
        return named
    return transformers.AutoModelForCausalLM


def lacks(model_class: Any, wanted: str = "logits") -> str:
    """What keeps a class from giving `wanted` for token ids, or nothing where it says of nothing that does."""
    forward = getattr(model_class, "forward", None)
    if forward is None:  # an auto class
        return ""
    try:
        signature = inspect.signature(forward, eval_str=True)
    except NameError:  # an annotation that only a type checker imports
        return ""
    if "input_ids" not in signature.parameters:
        return "takes no token ids"
    outputs = [kind for kind in _kinds(signature.return_annotation) if is_dataclass(kind)]
    if outputs and not any(field.name == wanted for kind in outputs for field in fields(kind)):
        return f"has no {wanted.replace('_', ' ')}"
    return ""


def _kinds(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) or (annotation,)
