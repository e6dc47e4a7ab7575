"""A model, loaded the way its users load it, with nothing missing and nothing left over."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
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
    are made dense while it is loaded. GPTQ whose modules have bits of their own is a causal language model that
    gptqmodel loads: transformers cannot.
    """
    logging.disable_progress_bar()
    checkpoint = Checkpoint.open(path)
    if checkpoint.quantization is not None and checkpoint.quantization.mixed:
        return _by_gptqmodel(checkpoint, trust_remote_code=trust_remote_code)
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
        _check_none(path, "transformers", kind.replace("_", " "), found.get(kind) or ())
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


def _by_gptqmodel(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    """In 16 bits: its one kernel for every number of bits has no other, and must be named on a CPU."""
    from gptqmodel import BACKEND, GPTQModel

    named = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))  # the older name
    model = GPTQModel.load(
        str(checkpoint.path),
        device=str(device()),
        dtype=torch.float16 if named == "float16" else torch.bfloat16,
        backend=BACKEND.GPTQ_TORCH if device().type == "cpu" else BACKEND.AUTO,
        trust_remote_code=trust_remote_code,
    ).model
    _check_none(
        checkpoint.path, "gptqmodel", "missing keys", dict(model.named_parameters()).keys() - checkpoint.tensors
    )
    _check_none(checkpoint.path, "gptqmodel", "unexpected keys", checkpoint.tensors.keys() - model.state_dict().keys())
    return model.eval()


def _check_none(path: Path, library: str, kind: str, keys: Collection[Any]) -> None:
    if keys:
        raise ReloadMismatch(
            f"{path.parent.name}/{path.name}: {library} reports {len(keys)} {kind}, such as {min(map(str, keys))}; "
            "this format cannot carry this architecture, choose another target"
        )
