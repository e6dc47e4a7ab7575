"""What a user's process sees of a written folder: run in a fresh process, through transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def logits(folder: Path, dtype: str) -> dict[str, Any]:
    """The loading report of transformers, the modules it made, and the logits of a fixed row of tokens, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        found = model.eval()(torch.arange(3, 35)[None]).logits.float()
    return {
        "report": {kind: sorted(map(str, keys)) for kind, keys in report.items()},
        "modules": {name: type(module).__name__ for name, module in model.named_modules()},
        "logits": found.tolist(),
    }
