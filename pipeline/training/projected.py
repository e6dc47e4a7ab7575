"""A projected model on disk: the backbone as transformers loads it, the projector beside it."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import pairing
from pipeline.checkpoint import INDEX, Checkpoint, copy_companions, inside
from pipeline.errors import CheckpointError, NonFinite, UnsupportedFormat
from pipeline.evaluation.load import load_model
from pipeline.model_class import class_of
from pipeline.pairing import Description
from pipeline.training.full import stored_state, write_tuned
from pipeline.training.projector import ProjectedModel, ProjectorLayer

BACKBONE = "backbone.safetensors"  # what trained of it, where the recipe's `trainable` named some


def write_projector(folder: Path, layer: ProjectorLayer, description: Description) -> None:
    """Write projector.safetensors and projector.json; `pairing.seal` ties them to the backbone once it lies beside.

    Raise NonFinite where a weight is NaN or infinite.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in layer.state_dict().items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFinite(f"projector: {name} holds NaN or infinity; lower train.arguments.learning_rate")
    save_file(tensors, folder / pairing.WEIGHTS, metadata={"format": "pt"})
    pairing.write_description(folder, description)


def write_backbone(backbone: Any, names: Collection[str], base: Checkpoint, folder: Path) -> None:
    """Write what trained of the backbone beside the projector, by the names that `base` stores it under."""
    state = stored_state(backbone)
    found: dict[str, torch.Tensor] = {}
    for name in sorted(names):
        stored = [key for key in base.tensors if key == name or key.endswith(f".{name}")]
        if name not in state or len(stored) != 1:
            raise UnsupportedFormat(
                f"{base.path}: does not store {name} by that name, so it could not be written back; use method head"
            )
        found[stored[0]] = state[name].detach().cpu().contiguous()
    save_file(found, folder / BACKBONE, metadata={"format": "pt"})


def lay_beside(base: Checkpoint, projector: Path, folder: Path) -> None:
    """Write the backbone, dense or quantized, with what trained of it, and the projector, sealed to each other."""
    if (projector / BACKBONE).exists():
        write_tuned(load_file(projector / BACKBONE), base, folder, new=(), dropped=())
    else:
        index = (INDEX,) if (base.folder / INDEX).is_file() else ()
        for name in (*base.shards, *index):
            shutil.copyfile(base.folder / name, folder / name)
    shutil.copyfile(base.folder / "config.json", folder / "config.json")
    copy_companions(base.path, folder)
    pairing.carry(projector, folder)


def read_projector(folder: Path) -> tuple[ProjectorLayer, Description]:
    """The projector of a folder; raise CheckpointError where its two files do not fit each other."""
    description = pairing.read_description(folder)
    layer = ProjectorLayer(description)
    try:
        layer.load_state_dict(load_file(inside(folder, pairing.WEIGHTS)))
    except (OSError, SafetensorError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{folder / pairing.WEIGHTS}: is not what {pairing.DESCRIPTION} says ({said}); take both from one artifact"
        ) from error
    return layer, description


def load_projected(path: Path | str, *, trust_remote_code: bool = False) -> ProjectedModel:
    """The backbone of a folder, quantized or dense, and the projector that was trained on it, ready to use.

    `model(input_ids, attention_mask).logits` are float32 [B, out_features]: logits of `model.description.classes`, a
    number, or for pairs a vector to compare by its cosine. Raise CheckpointError where the two do not belong together.
    """
    folder = Path(path)
    pairing.check(folder)
    layer, description = read_projector(folder)
    config = Checkpoint.open(folder).config
    model = load_model(
        folder,
        model_class=class_of(config, trust_remote_code=trust_remote_code),
        trust_remote_code=trust_remote_code,
    )
    return ProjectedModel(model, description, layer=layer)
