"""A model, loaded the way its users load it, with nothing missing and nothing left over."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
from transformers.utils import logging

from pipeline.checkpoint import Checkpoint
from pipeline.errors import ReloadMismatch


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def load_model(path: Path, *, model_class: Any = AutoModelForCausalLM, trust_remote_code: bool = False) -> Any:
    """The model of a folder or a GGUF file, by default a causal language model, in evaluation mode on `device()`.

    Raises ReloadMismatch on any missing, unexpected or mismatched key: transformers fills those with random weights.
    Dense weights are computed in float32 on a CPU, where bf16 has no units of its own on many machines; a GGUF file's
    are made dense while it is loaded.
    """
    logging.disable_progress_bar()
    checkpoint = Checkpoint.open(path)
    dense = checkpoint.quantization is None or checkpoint.is_gguf
    where = _gguf(checkpoint) if checkpoint.is_gguf else {}
    model, found = model_class.from_pretrained(
        checkpoint.folder,
        dtype=torch.float32 if dense and device().type == "cpu" else "auto",
        device_map=device().type,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
        **where,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(kind):
            first = sorted(map(str, found[kind]))[0]
            raise ReloadMismatch(
                f"{path.parent.name}/{path.name}: transformers reports {len(found[kind])} {kind.replace('_', ' ')}, "
                f"such as {first}; this format cannot carry this architecture, choose another target"
            )
    return model.eval()


def _gguf(checkpoint: Checkpoint) -> dict[str, Any]:
    """How a GGUF file is loaded: with its whole config, of which transformers by itself leaves out scaled positions."""
    from pipeline.gguf_rebuild import rebuild

    with tempfile.TemporaryDirectory() as folder:
        rebuild(checkpoint, Path(folder))
        config = AutoConfig.from_pretrained(folder)
    return {
        "gguf_file": checkpoint.path.name, "quantization_config": GgufConfig(dequantize=True), "config": config,
    }  # fmt: skip
