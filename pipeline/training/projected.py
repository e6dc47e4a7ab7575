"""A projected model on disk: the backbone as transformers loads it, the projector beside it."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import pairing
from pipeline.checkpoint import Checkpoint, inside
from pipeline.errors import CheckpointError, NonFinite
from pipeline.evaluation.load import load_model
from pipeline.model_class import class_of
from pipeline.pairing import Description
from pipeline.training.projector import ProjectedModel, ProjectorLayer


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
