"""What a user's process sees of a written folder: run in a fresh process, through transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def logits(folder: Path, dtype: str, rows: int = 1) -> dict[str, Any]:
    """The loading report of transformers, the modules it made, and the logits of fixed rows of tokens, in float32."""
    import torch
    import transformers

    named = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model, report = getattr(transformers, named).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    transformers.AutoTokenizer.from_pretrained(folder)
    tokens = torch.stack([torch.arange(3 + i, 35 + i) for i in range(rows)])
    with torch.no_grad():
        found = model.eval()(tokens).logits.float()
    return {
        "report": {kind: sorted(map(str, keys)) for kind, keys in report.items()},
        "modules": {name: type(module).__name__ for name, module in model.named_modules()},
        "logits": found.tolist(),
    }


def several(folders: list[Path], dtype: str = "float32", rows: int = 1) -> list[dict[str, Any]]:
    """What `logits` says of each folder: one process for all."""
    return [logits(folder, dtype, rows) for folder in folders]


def loaded_logits(folder: Path) -> Any:
    """The logits of a row of tokens, by the model that evaluation loads."""
    import torch

    from pipeline.evaluation.load import load_model

    with torch.no_grad():
        return load_model(folder)(torch.arange(3, 35)[None]).logits.float().tolist()
