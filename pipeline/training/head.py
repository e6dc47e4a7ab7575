"""The architecture's own classifier on a frozen base model: loaded, trained alone, written, laid beside its base.

The head is float32 whatever the base computes in. What the checkpoint lacks of the base itself, which is a pooler that
its pretraining had no use for, belongs to the head.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging

from pipeline import progress
from pipeline.checkpoint import Checkpoint, copy_companions, read_json
from pipeline.errors import CheckpointError, NonFinite, UnsupportedFormat
from pipeline.evaluation.load import device
from pipeline.shard_writer import ShardWriter
from pipeline.shards import DTYPE_NAMES, DTYPES, ShardReader

HeadTask = Literal["classification", "regression", "tagged"]
WEIGHTS = "head.safetensors"
CLASSES = {
    "classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "tagged": transformers.AutoModelForTokenClassification,
}


def load_head(
    folder: Path,
    *,
    task: HeadTask,
    classes: tuple[str, ...] | None,
    pad_token: int,
    seed: int,
    dtype: torch.dtype | None = None,
    quantization: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """The classifier on a checkpoint's base model, which is frozen and stays in evaluation mode; the head is new.

    `classes` name the labels in order, and are None for a regression. Dense weights are computed in `dtype`, by default
    float32 on a CPU and the checkpoint's own elsewhere; `quantization` is a config to quantize them with while they are
    loaded. Raise UnsupportedFormat where the architecture has no such head, CheckpointError where base weights lack.
    """
    logging.disable_progress_bar()
    checkpoint = Checkpoint.open(folder)
    dense = checkpoint.quantization is None and quantization is None
    config = _config(folder, task=task, classes=classes, pad_token=pad_token, trust_remote_code=trust_remote_code)
    chosen = dtype or (torch.float32 if dense and device().type == "cpu" else "auto")
    more = {} if quantization is None else {"quantization_config": quantization}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # what the checkpoint lacks begins from it
        try:
            model, found = CLASSES[task].from_pretrained(
                folder, config=config, dtype=chosen, device_map=device().type, output_loading_info=True,
                ignore_mismatched_sizes=True, trust_remote_code=trust_remote_code, local_files_only=True, **more,
            )  # fmt: skip
        except ValueError as error:
            said = " ".join(str(error).split())[:200]
            raise UnsupportedFormat(f"{folder}: has no head for {task} ({said}); use method projector") from error
    new = {*map(str, found["missing_keys"]), *(str(_name(key)) for key in found["mismatched_keys"])}
    _freeze(model, new, folder)
    return model


def head_weights(model: Any) -> dict[str, nn.Parameter]:
    """What trains of a model that `load_head` gave, by name."""
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
    copy_companions(base.path, folder)
    (folder / "config.json").write_bytes((head / "config.json").read_bytes())


def _prefix(head: Path) -> str:
    with safe_open(head / WEIGHTS, framework="pt") as file:
        prefix = (file.metadata() or {}).get("prefix")
    if not prefix:
        raise CheckpointError(f"{head / WEIGHTS}: does not say which base model it lies on; train the head again")
    return str(prefix)


def _config(
    folder: Path, *, task: HeadTask, classes: tuple[str, ...] | None, pad_token: int, trust_remote_code: bool
) -> Any:
    labels = list(classes or ("score",))
    config = transformers.AutoConfig.from_pretrained(
        folder,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        trust_remote_code=trust_remote_code,
        local_files_only=True,
    )
    # Otherwise transformers reads it off the first batch; and a decoder looks for the last token by the padding's id.
    config.problem_type = {"classification": "single_label_classification", "regression": "regression"}.get(task)
    text = config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = pad_token
    return config


def _freeze(model: Any, new: set[str], folder: Path) -> None:
    """Leave the head alone to train, and of the base what it lacks: a pooler."""
    prefix = f"{model.base_model_prefix}."
    base = getattr(model, model.base_model_prefix, None)
    if base is None or base is model:
        raise UnsupportedFormat(f"{folder}: {type(model).__name__} has no base model of its own; use method projector")
    lacking = sorted(name for name in new if name.startswith(prefix) and not name.startswith(f"{prefix}pooler."))
    if lacking:
        raise CheckpointError(f"{folder}: lacks {lacking[0]}, which {type(model).__name__} needs; download it again")
    for name, weight in model.named_parameters():
        trains = not name.startswith(prefix) or name in new
        if trains and not weight.is_floating_point():
            raise UnsupportedFormat(f"{folder}: quantizes {name}, which is to train; use method projector")
        weight.requires_grad_(trains)
        if trains:
            weight.data = weight.data.to(torch.float32)
    base.train = types.MethodType(_stays, base)
    base.eval()
    base.register_forward_hook(_in_float32)


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


def _name(key: Any) -> str:
    """A mismatched key is a name, or a name with two shapes."""
    return str(key[0] if isinstance(key, tuple) else key)
