"""The checkpoint that training stands on, as a model: which of its weights are new, which have no place in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import AutoConfig, set_seed

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, NonFinite, UnsupportedFormat
from pipeline.shards import DTYPES
from pipeline.training.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model in memory; `new` are its parameters that the checkpoint does not hold, drawn from the seed."""

    model: Any
    task: Task
    new: frozenset[str]


def open_dense(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint; raise UnsupportedFormat where it is quantized."""
    if checkpoint.quantization is not None:
        raise UnsupportedFormat(
            f"{checkpoint.path}: is quantized ({checkpoint.quantization.method}), training stands on dense weights; "
            "upcast it first"
        )
    return checkpoint


def compute_dtype(base: Checkpoint, device: str) -> torch.dtype:
    """What frozen weights are computed in; whatever trains beside them is always float32.

    On a CPU float32: without AVX512-BF16 or AMX a bf16 step of a 6.8 M Llama took 5.0 times as long (46.9 s and 9.4 s,
    2 cores). On a GPU the checkpoint's own dtype, except float16, whose gradients underflow without a loss scaler.
    """
    floats = (DTYPES[info.dtype] for info in base.tensors.values() if info.dtype in {"BF16", "F16", "F32"})
    return torch.bfloat16 if device == "cuda" and next(floats, None) == torch.bfloat16 else torch.float32


def load(
    base: Checkpoint, task: Task, *, dtype: torch.dtype, seed: int, trust_remote_code: bool, model_class: Any = None
) -> Loaded:
    """The model of a checkpoint, dense or quantized, with the head that `task` needs or of `model_class`, on the CPU.

    `model_class` and a language model must find every key that their class has, and no other, or CheckpointError is
    raised: transformers fills what is missing with random weights. A classifier's own head may be missing, and is then
    drawn from `seed`.
    """
    transformers.utils.logging.disable_progress_bar()
    set_seed(seed)
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=trust_remote_code, local_files_only=True)
    as_it_is = task.language or model_class is not None
    if not as_it_is:
        task.describe(config)
    try:
        model, found = (model_class or task.model_class).from_pretrained(
            base.path, config=config, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code,
            local_files_only=True, ignore_mismatched_sizes=not as_it_is,
        )  # fmt: skip
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UnsupportedFormat(
            f"{base.path}: transformers has no {task.model_class.__name__} for {base.model_type}; use method projector"
        ) from error
    new = frozenset(_names(found, "missing_keys") | _names(found, "mismatched_keys"))
    dropped = tuple(sorted({name.rpartition(".")[0] for name in _names(found, "unexpected_keys")}))
    _check_keys(base, model, new, dropped, as_it_is=as_it_is)
    if base.quantization is not None:
        _compute_in(model, dtype)
    if not as_it_is:
        task = replace(task, architecture=type(model).__name__, dropped=dropped)
    return Loaded(model=model, task=task, new=new)


def tied_names(model: Any) -> frozenset[str]:
    """Every tensor that shares its values with another, both sides of each pair."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return frozenset(tied) | frozenset(tied.values())


def head_names(model: Any, new: frozenset[str]) -> frozenset[str]:
    """The parameters of a classifier's head: all outside its base model, and those within that the checkpoint lacks."""
    prefix = f"{model.base_model_prefix}."
    return frozenset(name for name, _ in model.named_parameters() if not name.startswith(prefix)) | new


def check_finite(model: torch.nn.Module) -> None:
    """Raise NonFinite where a trained weight is NaN or infinite."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and not torch.isfinite(weight).all():
            raise NonFinite(f"train: {name} holds NaN or infinity after training; lower train.arguments.learning_rate")


def _names(found: Mapping[str, Any], kind: str) -> set[str]:
    """The names among transformers' findings; a mismatched key comes with its shapes."""
    return {str(item[0] if isinstance(item, tuple) else item) for item in found.get(kind) or ()}


def _check_keys(base: Checkpoint, model: Any, new: frozenset[str], dropped: tuple[str, ...], *, as_it_is: bool) -> None:
    """Raise CheckpointError for a missing key of a backbone, or an odd one that is not another head's."""
    inner = f"{model.base_model_prefix}."
    # A classifier may lack its head, and the pooler that its base's pretraining had no use for.
    lacking = {name for name in new if name.startswith(inner) and not name.startswith(f"{inner}pooler.")}
    odd = sorted(new | set(dropped)) if as_it_is else sorted(lacking | {n for n in dropped if n.startswith(inner)})
    if odd:
        raise CheckpointError(
            f"{base.path}: transformers reports a missing or unexpected key, such as {odd[0]}; the weights and "
            "config.json do not belong together"
        )


def _compute_in(model: Any, dtype: torch.dtype) -> None:
    """Have a quantized model compute in `dtype`: bitsandbytes takes the one that its checkpoint names."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # says at every call that it casts
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
        for weight in module.parameters(recurse=False):
            if weight.dtype in {torch.float16, torch.bfloat16}:
                weight.data = weight.data.to(dtype)
