"""Which modules of a classifier are its head, which stays dense in every format."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from pipeline.checkpoint import Checkpoint
from pipeline.model_class import class_of
from pipeline.skeleton import skeleton_of


def is_classifier(model_class: Any) -> bool:
    """Whether a class of transformers puts a classifier on a base model."""
    return str(model_class.__name__).endswith("Classification")


def head_of(model: Any) -> tuple[str, ...]:
    """The linear modules of a classifier that lie outside its base model, by name, in order; of no other model."""
    if not is_classifier(type(model)):
        return ()
    base = f"{model.base_model_prefix}."
    linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return tuple(name for name in linear if not name.startswith(base))


def named_dense(dense: Checkpoint, packed: Collection[str], *, trust_remote_code: bool) -> list[str]:
    """What `left_dense` has, or nothing where that is the output embedding alone, which transformers spares unasked."""
    left = left_dense(dense, packed, trust_remote_code=trust_remote_code)
    skeleton = skeleton_of(
        dense.folder, dtype=torch.float32, trust_remote_code=trust_remote_code, stored=len(dense.tensors)
    )
    output = skeleton.model.get_output_embeddings()
    names = {name for name, module in skeleton.model.named_modules() if module is output}
    names |= {name.removesuffix(".weight") for name in dense.tensors
              if (place := skeleton.place(name)) and place.parameter.removesuffix(".weight") in names}  # fmt: skip
    return left if set(left) - names else []


def left_dense(dense: Checkpoint, packed: Collection[str], *, trust_remote_code: bool) -> list[str]:
    """The linear modules of the model that are not among the `packed` modules of its checkpoint, sorted.

    Where the checkpoint calls one otherwise than transformers, both names.
    """
    skeleton = skeleton_of(
        dense.folder, dtype=torch.float32, trust_remote_code=trust_remote_code, stored=len(dense.tensors)
    )
    places = {name: place.parameter for name in dense.tensors if (place := skeleton.place(name))}
    stored = {parameter.removesuffix(".weight"): name.removesuffix(".weight") for name, parameter in places.items()}
    linear = (name for name, module in skeleton.model.named_modules() if isinstance(module, torch.nn.Linear))
    pairs = ((name, stored.get(name, name)) for name in linear)
    return sorted({name for pair in pairs if pair[1] not in packed for name in pair})


def kept_dense(dense: Checkpoint, *, trust_remote_code: bool) -> list[str] | None:
    """The modules that a quantized config must name so that the head stays dense, or None where it need name none.

    transformers leaves dense the module whose parameter comes last, which it finds by a name that ends in `.weight`:
    a classifier with a bias is quantized with the rest (`quantizers/base.py`, `get_keys_to_not_convert`). Naming some
    ends that rule, so what it found is named too.
    """
    if not is_classifier(class_of(dense.config, trust_remote_code=trust_remote_code)):
        return None
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = skeleton_of(
        dense.folder, dtype=torch.float32, trust_remote_code=trust_remote_code, stored=len(dense.tensors)
    ).model
    head = head_of(model)
    spared = HfQuantizer.get_modules_to_not_convert(model)
    if not any(should_convert_module(name, spared) for name in head):
        return None
    known = {name for name, _ in model.named_modules()}
    return sorted({*head, *(name for name in spared if name in known)})
