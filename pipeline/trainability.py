"""What can be trained on a checkpoint, by what the installed libraries say of it, and what to do where it cannot.

Quantizers are asked, not listed: which of them train differs from version to version. The rules that do not depend on
one are transformers' guard (`trainer_utils.validate_quantization_for_training`), which Requant never works around:
quantized weights themselves do not train, a quantized model is not compiled, and Trainer takes one only with adapters.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.model_class import class_of, lacks

PEFT = (0, 18)  # the first that transformers' integration works with
LIBRARIES = ("transformers", "peft", "bitsandbytes", "gptqmodel", "optimum", "compressed-tensors", "torchao")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the installed libraries say: `adapters` is the quantizer's is_trainable.

    Its is_qat_trainable is not asked: Requant trains no quantized weights, whatever it says. `reason` says why nobody
    could be asked, `hidden_states` whether the backbone gives any, `versions` of what.
    """

    adapters: bool = True
    reason: str = ""
    hidden_states: bool = True
    versions: Mapping[str, str] = field(default_factory=dict)


def ask(config: Mapping[str, Any], quantization: Mapping[str, Any] | None, trust_remote_code: bool) -> Answer:  # noqa: FBT001 - the child's body takes positions
    """Ask about a model of `config`, quantized by `quantization` (its quantization_config) or dense (None)."""
    # The architecture's own class: its base model's outputs are among its own.
    hidden_states = not lacks(class_of(config, trust_remote_code=trust_remote_code), "hidden_states")
    versions = {name: found for name in LIBRARIES if (found := _version(name))}
    if quantization is None:
        return Answer(hidden_states=hidden_states, versions=versions)
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        quantizer: Any = AutoHfQuantizer.from_config(dict(quantization), pre_quantized=True)
        adapters = bool(quantizer.is_trainable)
    except Exception as error:  # noqa: BLE001 - a quantizer may ask for any library, or raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Answer(adapters=False, reason=reason, hidden_states=hidden_states, versions=versions)
    return Answer(adapters=adapters, hidden_states=hidden_states, versions=versions)


def refusal(
    method: str, engine: str, *, format_title: str, base: str, arguments: Mapping[str, Any], answer: Answer
) -> str:
    """Why a method cannot train on a base of that format, with the remedy; nothing where it can.

    `format_title` is empty for a dense base, `base` is the recipe's `train.base`.
    """
    if method == "lora" and (found := peft_version()) < PEFT:
        return f"train.method lora needs peft {_dotted(PEFT)} or newer, found {_dotted(found)}; upgrade it"
    if method == "projector" and not answer.hidden_states:
        return "train.method projector needs a model that gives hidden states, and this one does not; use method head"
    return _quantized_refusal(method, engine, format_title, base, arguments, answer) if format_title else ""


def peft_version() -> tuple[int, ...]:
    """The installed peft's version; (0,) where there is none."""
    parts = (_version("peft") or "0").split(".")[:2]
    return tuple(int(part) for part in parts if part.isdigit())


def _quantized_refusal(
    method: str, engine: str, title: str, base: str, arguments: Mapping[str, Any], answer: Answer
) -> str:
    if method in {"full", "qat"}:
        return (
            f"train.method {method} trains the weights themselves, which {title} ones (train.base: {base}) cannot be; "
            "use base dense, which upcasts first, or method lora"
        )
    if arguments.get("torch_compile"):
        return (
            f"train.arguments: torch_compile does not work on a quantized base ({title}); leave it out, or use base "
            "dense, which upcasts first"
        )
    if method in {"head", "projector"} and engine != "features":
        return (
            f"train.engine trainer: transformers' Trainer takes no quantized model without adapters ({title}); use "
            "engine features, or base dense, which upcasts first"
        )
    if answer.reason or (method == "lora" and not answer.adapters):
        why = answer.reason or f"transformers {answer.versions.get('transformers')}"
        return (
            f"train.method {method}: the installed quantizer does not train on {title} ({why}); use base dense, which "
            "upcasts first, or base nf4"
        )
    return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
