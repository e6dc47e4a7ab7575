"""Which modules of a classifier are its head, which stays dense in every format."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from pipeline.checkpoint import Checkpoint
from pipeline.model_class import class_of
from pipeline.skeleton import Skeleton, skeleton_of


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
    skeleton = _skeleton(dense, trust_remote_code=trust_remote_code)
    output = skeleton.model.get_output_embeddings()
    left = _left(skeleton, dense, packed)
    plain = all(skeleton.model.get_submodule(module) is output for module in left)
    return [] if plain else sorted({*left, *left.values()})


def left_dense(dense: Checkpoint, packed: Collection[str], *, trust_remote_code: bool) -> list[str]:
    """The linear modules of the model that are not among the `packed` modules of its checkpoint, sorted.

    Where the checkpoint calls one otherwise than transformers, both names.
    """
    left = _left(_skeleton(dense, trust_remote_code=trust_remote_code), dense, packed)
    return sorted({*left, *left.values()})


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

    model = _skeleton(dense, trust_remote_code=trust_remote_code).model
    head = head_of(model)
    spared = HfQuantizer.get_modules_to_not_convert(model)
    if not any(should_convert_module(name, spared) for name in head):
        return None
    known = {name for name, _ in model.named_modules()}
    return sorted({*head, *(name for name in spared if name in known)})


def _skeleton(dense: Checkpoint, *, trust_remote_code: bool) -> Skeleton:
    return skeleton_of(
        dense.folder, dtype=torch.float32, trust_remote_code=trust_remote_code, stored=len(dense.tensors)
    )


def _left(skeleton: Skeleton, dense: Checkpoint, packed: Collection[str]) -> dict[str, str]:
    """Linear module that is not packed, as transformers calls it → what the checkpoint calls it."""
    places = {name: place.parameter for name in dense.tensors if (place := skeleton.place(name))}
    stored = {parameter.removesuffix(".weight"): name.removesuffix(".weight") for name, parameter in places.items()}
    linear = (name for name, module in skeleton.model.named_modules() if isinstance(module, torch.nn.Linear))
    return {name: stored.get(name, name) for name in linear if stored.get(name, name) not in packed}
