"""The architecture's own classifier on a frozen base model: loaded, trained alone, written, laid beside its base.

The head is float32 whatever the base computes in. What the checkpoint lacks of the base itself, which is a pooler that
its pretraining had no use for, belongs to the head.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import progress
from pipeline.checkpoint import Checkpoint, copy_companions, read_json
from pipeline.companions import PROJECTOR
from pipeline.errors import CheckpointError, NonFinite, UnsupportedFormat
from pipeline.shard_writer import ShardWriter
from pipeline.shards import DTYPE_NAMES, DTYPES, ShardReader
from pipeline.training.model import Loaded, head_names

WEIGHTS = "head.safetensors"


def prepare(loaded: Loaded) -> frozenset[str]:
    """Freeze the base model of a classifier, in evaluation mode; return the names of the head's weights, float32.

    Raise UnsupportedFormat where the model has no base of its own, or the head is quantized.
    """
    model = loaded.model
    name, base = type(model).__name__, getattr(model, model.base_model_prefix, None)
    if base is None or base is model:
        raise UnsupportedFormat(f"{name}: has no base model of its own; use method projector")
    own = head_names(model, loaded.new)
    for key, weight in model.named_parameters():
        weight.requires_grad_(key in own)
        if key in own and not weight.is_floating_point():
            raise UnsupportedFormat(f"{name}: quantizes {key}, which is to train; use method projector")
        if key in own:
            weight.data = weight.data.to(torch.float32)
    base.train = types.MethodType(_stays, base)
    base.eval()
    base.register_forward_hook(_in_float32)
    return own


def unfreeze_base(model: Any) -> None:
    """Let the base model go into training mode with the rest: some of its weights train too."""
    del getattr(model, model.base_model_prefix).train


def head_weights(model: Any) -> dict[str, nn.Parameter]:
    """What trains of a prepared model, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def write_head(folder: Path, model: Any, base: Path) -> None:
    """Write head.safetensors (float32) and the config.json with which the head lies on `base`.

    Raise NonFinite where a weight is NaN or infinite.
    """
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in head_weights(model).items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFinite(f"head: {name} holds NaN or infinity; lower train.arguments.learning_rate")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", "prefix": model.base_model_prefix})
    config = read_json(base / "config.json")
    said = model.config.to_dict()
    wanted = ("id2label", "label2id", "problem_type", "pad_token_id")
    config |= {"architectures": [type(model).__name__], **{name: said.get(name) for name in wanted}}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def merge_head(base: Checkpoint, head: Path, folder: Path) -> None:
    """Write the classifier that `write_head` left in `head`, whole: the tensors of its base model, and the head's.

    Base tensors are copied byte for byte, packed ones too; another head of the base, such as a language model's, is
    left out.
    """
    prefix = _prefix(head)
    new = load_file(head / WEIGHTS)
    prefixed = any(name.startswith(f"{prefix}.") for name in base.tensors)
    names = {
        (name if prefixed else f"{prefix}.{name}"): name
        for name in base.tensors
        if not prefixed or name.startswith(f"{prefix}.")
    }
    names = {name: source for name, source in names.items() if name not in new}
    shapes = {name: (base.tensors[source].dtype, base.tensors[source].shape) for name, source in names.items()}
    shapes |= {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in new.items()}
    with ShardReader(base) as reader, ShardWriter(folder, shapes) as writer:
        for done, (name, (dtype, _)) in enumerate(shapes.items(), start=1):
            writer.write(name, (new[name] if name in new else reader[names[name]]).to(DTYPES[dtype]))
            progress.step("merge", done=done, total=len(shapes), unit="tensors")
    copy_companions(base.path, folder, but=PROJECTOR)
    (folder / "config.json").write_bytes((head / "config.json").read_bytes())


def _prefix(head: Path) -> str:
    with safe_open(head / WEIGHTS, framework="pt") as file:
        prefix = (file.metadata() or {}).get("prefix")
    if not prefix:
        raise CheckpointError(f"{head / WEIGHTS}: does not say which base model it lies on; train the head again")
    return str(prefix)


def _stays(module: nn.Module, mode: bool = True) -> nn.Module:  # noqa: FBT001, FBT002 - torch's own signature
    """Evaluation mode, whatever is asked for: a frozen base model has no dropout."""
    _ = mode
    return nn.Module.train(module, mode=False)


def _in_float32(_: nn.Module, _inputs: Any, output: Any) -> Any:
    """What a base model returns, as the head wants it."""
    for name in ("last_hidden_state", "pooler_output"):
        value = getattr(output, name, None)
        if isinstance(value, torch.Tensor) and value.dtype != torch.float32:
            setattr(output, name, value.to(torch.float32))
    return output
