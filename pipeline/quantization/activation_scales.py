"""The scales of activations that transformers asks for of an AWQ checkpoint, all ones.

AutoAWQ scaled what no norm or linear layer before it could take on by dividing the activation between the two layers of
an MLP. transformers (integrations/awq.py) therefore puts a `ScaledActivation` into some architectures, and reports its
`scales` as missing where they are not stored. Requant folds scales into weights only, so these stay what they begin as.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from pipeline.checkpoint import Checkpoint
from pipeline.shards import DTYPES
from pipeline.skeleton import skeleton_of
from pipeline.targets import AWQTarget, Target


def scales_of(target: Target, parent: Checkpoint, *, trust_remote_code: bool) -> dict[str, Tensor]:
    """Tensor → ones [I] in the dtype of the layer before; none for other formats and architectures.

    The names are the parent's own, whatever prefix it gives its layers.
    """
    from transformers.integrations.awq import AWQ_SCALES_MAPPINGS

    if not isinstance(target, AWQTarget) or parent.model_type not in AWQ_SCALES_MAPPINGS:
        return {}
    names = AWQ_SCALES_MAPPINGS[parent.model_type]
    return dict(_ones(parent, names, trust_remote_code=trust_remote_code))


def _ones(parent: Checkpoint, names: Mapping[str, str], *, trust_remote_code: bool) -> Iterator[tuple[str, Tensor]]:
    """As transformers' own `replace_quantization_scales` looks for them, which needs gptqmodel to be imported."""
    skeleton = skeleton_of(
        parent.folder, dtype=torch.float32, trust_remote_code=trust_remote_code, stored=len(parent.tensors)
    )
    ending = f".{names['layer_before_act']}.weight"
    for name, info in parent.tensors.items():
        place = skeleton.place(name) if name.endswith(ending) else None
        if place is None:
            continue
        block = skeleton.model.get_submodule(place.parameter.removesuffix(ending))
        if names["act"] in dict(block.named_children()):
            ones = torch.ones(info.shape[0], dtype=DTYPES[info.dtype])
            yield f"{name.removesuffix(ending)}.{names['act']}.scales", ones
