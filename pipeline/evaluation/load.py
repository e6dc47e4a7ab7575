"""A model, loaded the way its users load it, with nothing missing and nothing left over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from pipeline.checkpoint import Checkpoint
from pipeline.errors import ReloadMismatch


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def load_model(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The causal language model of a folder, in evaluation mode on `device()`.

    Raises ReloadMismatch on any missing, unexpected or mismatched key: transformers fills those with random weights.
    Dense weights are computed in float32 on a CPU, where bf16 has no units of its own on many machines.
    """
    logging.disable_progress_bar()
    dense = Checkpoint.open(path).quantization is None
    dtype = torch.float32 if dense and device().type == "cpu" else "auto"
    model, found = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map=device().type, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(kind):
            first = sorted(map(str, found[kind]))[0]
            raise ReloadMismatch(
                f"{path.parent.name}/{path.name}: transformers reports {len(found[kind])} {kind.replace('_', ' ')}, "
                f"such as {first}; this format cannot carry this architecture, choose another target"
            )
    return model.eval()
