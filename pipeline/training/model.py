"""The dense checkpoint as a model to train, and the names that its tensors are stored under."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, NonFinite, UnsupportedFormat


def open_dense(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint; raise UnsupportedFormat where it is quantized."""
    if checkpoint.quantization is not None:
        raise UnsupportedFormat(
            f"{checkpoint.path}: is quantized ({checkpoint.quantization.method}), training stands on dense weights; "
            "upcast it first"
        )
    return checkpoint


def load_base(base: Checkpoint, *, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The causal language model of a dense checkpoint, in `dtype`, on the CPU.

    Raise CheckpointError on a missing, unexpected or mismatched key: transformers fills those with random weights.
    """
    logging.disable_progress_bar()
    model, found = AutoModelForCausalLM.from_pretrained(
        base.path, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code, local_files_only=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(kind):
            first = sorted(map(str, found[kind]))[0]
            raise CheckpointError(
                f"{base.path}: transformers reports {kind.replace('_', ' ')}, such as {first}; the weights and "
                "config.json do not belong together"
            )
    return model


def tied_names(model: Any) -> frozenset[str]:
    """Every tensor that shares its values with another, both sides of each pair."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return frozenset(tied) | frozenset(tied.values())


def check_finite(model: torch.nn.Module) -> None:
    """Raise NonFinite where a trained weight is NaN or infinite."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and not torch.isfinite(weight).all():
            raise NonFinite(f"train: {name} holds NaN or infinity after training; lower train.arguments.learning_rate")
