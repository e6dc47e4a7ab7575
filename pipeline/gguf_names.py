"""Which Hugging Face tensor each GGUF tensor becomes, and what is undone on the way.

llama.cpp renames tensors, and for some architectures permutes, shifts or fuses them; `pipeline.gguf_places` knows how
to undo that. Here every tensor of a file is placed, dropped with a reason, or refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    revert_weight_conversion,
)

from pipeline import formats
from pipeline.catalog import FORMATS
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, UnexpectedTensor
from pipeline.formats import dense
from pipeline.gguf_places import Finish, Naming, Place, naming_of
from pipeline.pieces import Piece
from pipeline.shards import TensorGroup
from pipeline.skeleton import Skeleton

# llama.cpp computes with these tensors what transformers computes from config.json: config key → its value.
_ROPE_TENSORS = {
    "rope_freqs.weight": "llama3",
    "rope_factors_long.weight": "longrope",
    "rope_factors_short.weight": "longrope",
}


def pieces(
    checkpoint: Checkpoint, skeleton: Skeleton, groups: Iterable[TensorGroup]
) -> tuple[list[Piece], dict[str, str]]:
    """What each tensor of a GGUF checkpoint becomes, and GGUF name → reason for those that become nothing.

    `skeleton` is that of the rebuilt config. Names are those that transformers saves the model by: of its state_dict,
    with one tensor for each expert where that is how such checkpoints are kept. No weight is read.
    Raise UnexpectedTensor for a tensor that has no place, CheckpointError for one that does not fit it.
    """
    model = skeleton.model
    naming, saved = naming_of(model, checkpoint.model_type), _Saved(skeleton)
    found: dict[str, Piece] = {}
    dropped: dict[str, str] = {}
    joined: dict[str, list[TensorGroup | None]] = {}
    for group in groups:
        name, shape = group.dense_name, shape_of(group, checkpoint)
        place = _place(naming, name, shape)
        if place is None or not saved.holds(place.target):
            dropped[name] = _reason_to_drop(name, place, model)
        elif place.parts:
            parts = joined.setdefault(place.target, [None] * place.parts)
            _once(place.target, twice=parts[place.part] is not None)
            parts[place.part] = group
        else:
            done = shape if place.finish is None else _shape_after(name, place.finish, shape)
            _add(found, saved.piece(saved.name(place.target), group, done, place.finish), saved)
    for target, parts in joined.items():
        groups_of = [part for part in parts if part is not None]
        if len(groups_of) < len(parts):
            raise MissingTensor(
                f"{target}: {groups_of[0].dense_name} is there, but not the tensor that it is joined with; the file is "
                "incomplete, download it again"
            )
        for piece in saved.experts(target, groups_of, checkpoint):
            _add(found, piece, saved)
    return list(found.values()), dropped


def shape_of(group: TensorGroup, checkpoint: Checkpoint) -> tuple[int, ...]:
    """The dense shape of a group."""
    assert checkpoint.quantization is not None
    if group.packed:
        return formats.load(FORMATS["gguf"]).dense_shape(group, checkpoint.quantization)
    return dense.dense_shape(group)


class _Saved:
    """The names that transformers saves a model's tensors by, and their shapes."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton, model = skeleton, skeleton.model
        state = {name: torch.empty(tensor.shape, device="meta") for name, tensor in model.state_dict().items()}
        self._state = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._back = [entry.reverse_transform() for entry in renamings[::-1] if not isinstance(entry, PrefixChange)]

    def holds(self, target: str) -> bool:
        """Whether the model itself has a tensor of this name."""
        return target in self._state

    def name(self, target: str) -> str:
        """What the model's tensor `target` is saved as."""
        return target if target in self.shapes else str(apply_renamings(target, self._back))

    def piece(self, name: str, group: TensorGroup, shape: tuple[int, ...], finish: Finish | None = None) -> Piece:
        """A piece in the dtype that the model keeps it in."""
        place = self._skeleton.place(name)
        dtype = place.dtype if place else torch.float32
        return Piece(name=name, group=group, dtype=dtype, shape=shape, finish=finish)

    def experts(self, target: str, groups: list[TensorGroup], checkpoint: Checkpoint) -> list[Piece]:
        """The tensors of the experts' tensor `target`, whose parts are `groups`, each [E, rows, columns]."""
        templates = self._templates(target, len(groups))
        if not templates:
            tensors = {
                f"{i}.{_part(group)}": tensor for i, group in enumerate(groups) for tensor in group.tensors.values()
            }
            if len(groups) == 1:
                joined = groups[0]
            else:
                joined = TensorGroup(module=target.rpartition(".")[0], dense_name=target, tensors=tensors, packed=True)
            name = self.name(target)
            return [self.piece(name, joined, shape_of(joined, checkpoint))]
        made = []
        for template, group in zip(templates, groups, strict=True):
            ((part, tensor),) = group.tensors.items()
            shape = shape_of(group, checkpoint)
            for i in range(shape[0] if len(shape) == 3 else 0):  # noqa: PLR2004 - experts stack to three dimensions
                name = str(apply_renamings(template.replace("*", str(i)), self._back))
                one = TensorGroup(module=group.module, dense_name=name, tensors={part: tensor[i]}, packed=group.packed)
                made.append(self.piece(name, one, shape[1:]))
        return made

    def _templates(self, target: str, count: int) -> list[str]:
        """The names of an expert's own tensors, `*` for its number, where `target` is made of those alone."""
        for converter in self._converters:
            (*others, pattern) = converter.target_patterns
            merge, *join = converter.operations
            plain = isinstance(merge, MergeModulelist) and merge.dim == 0
            plain &= not join if count == 1 else [type(op) for op in join] == [Concatenate] and join[0].dim == 1
            sources = converter.source_patterns
            if target.endswith(pattern) and not others and plain and len(sources) == count:
                names = [target.removesuffix(pattern) + source for source in sources]
                first = str(apply_renamings(names[0].replace("*", "0"), self._back))
                return names if first in self.shapes else []
        return []


def _add(found: dict[str, Piece], piece: Piece, saved: _Saved) -> None:
    _once(piece.name, twice=piece.name in found)
    expected = saved.shapes.get(piece.name)
    if piece.shape != expected:
        raise CheckpointError(
            f"{piece.group.dense_name}: gives {piece.name} the shape {list(piece.shape)}, but the file's metadata "
            f"describe {list(expected) if expected else 'none'}; the two do not belong together"
        )
    found[piece.name] = piece


def _once(name: str, *, twice: bool) -> None:
    if twice:
        raise UnexpectedTensor(f"{name}: is made from two tensors of the file; download it again")


def _reason_to_drop(name: str, place: Place | None, model: Any) -> str:
    """Why a tensor without a place may go; raise UnexpectedTensor if it may not."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None)
    if name in _ROPE_TENSORS and isinstance(rope, Mapping) and rope.get("rope_type") == _ROPE_TENSORS[name]:
        return "config.json says the same as rope_parameters"
    ignored = model._keys_to_ignore_on_load_unexpected or ()  # noqa: SLF001 - transformers' own list; none is public
    if place is not None and any(re.search(pattern, place.target) for pattern in ignored):
        return "the architecture ignores it"
    raise UnexpectedTensor(
        f"{name}: transformers has no place for it in a {model.config.model_type} made from a GGUF file; upcast the "
        "original checkpoint instead"
    )


def _place(naming: Naming, name: str, shape: tuple[int, ...]) -> Place | None:
    try:
        return naming.place(name, shape)
    except Exception as error:  # transformers undoes what llama.cpp does to this architecture, of any shape
        raise _unfitting(name, shape, error) from error


def _shape_after(name: str, finish: Finish, shape: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(finish(torch.ones(()).expand(shape)).shape)
    except Exception as error:
        raise _unfitting(name, shape, error) from error


def _unfitting(name: str, shape: tuple[int, ...], error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{name}: has shape {list(shape)}, from which transformers cannot make what the file's metadata describe "
        f"({error}); the two do not belong together"
    )


def _part(group: TensorGroup) -> str:
    """The ggml type of a group's only component."""
    ((part, tensor),) = group.tensors.items()
    return part if group.packed else {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[tensor.dtype]
