"""Small classifiers, taggers, regressors and projected models that tests build, each with a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline import pairing
from pipeline.sections import Projector
from pipeline.training.projected import write_projector
from pipeline.training.projector import ProjectorLayer, describe
from tests.checkpoints import tiny_llama, tiny_tokenizer

SIDES = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LABELS = ("bad", "good", "so-so")


def tiny_head(
    folder: Path, architecture: str, *, labels: tuple[str, ...] = LABELS, dtype: str = "float32", **keys: Any
) -> Path:
    """A random classifier, such as LlamaForSequenceClassification, of those labels (one: a regressor), in `folder`.

    Its weights are large enough for its rows to differ, and `keys` go into its config.
    """
    model_class = getattr(transformers, architecture)
    given = {**SIDES, "initializer_range": 0.1, "id2label": dict(enumerate(labels)), **keys}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**given)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_projected(
    folder: Path, task: str, *, classes: tuple[str, ...] | None = None, kind: str = "linear", dtype: str = "float32"
) -> Path:
    """A random Llama with a random projector for that task, sealed."""
    tiny_llama(folder, dtype=dtype)
    description = describe(Projector(kind=kind, pooling="mean"), in_features=128, task=task, classes=classes)
    layer = ProjectorLayer(description)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(20)
    write_projector(folder, layer, description)
    pairing.seal(folder)
    return folder
