"""Which Hugging Face tensor each GGUF tensor becomes, and what is undone on the way.

llama.cpp renames tensors, and for some architectures permutes, shifts or fuses them. How to undo that is transformers'
own knowledge, in one of two places: integrations/gguf/gguf_conversion_mapping.py for the architectures that it lists,
modeling_gguf_pytorch_utils.py for the others. Neither is copied here: both are asked, tensor by tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import modeling_gguf_pytorch_utils as legacy
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.integrations.gguf.gguf_conversion_mapping import ConcatenateRows
from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported

from pipeline import formats
from pipeline.catalog import FORMATS
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, UnexpectedTensor
from pipeline.formats import dense
from pipeline.shards import TensorGroup

Finish = Callable[[Tensor], Tensor]
# llama.cpp computes with these tensors what transformers computes from config.json: config key → its value.
_ROPE_TENSORS = {
    "rope_freqs.weight": "llama3",
    "rope_factors_long.weight": "longrope",
    "rope_factors_short.weight": "longrope",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A tensor of the dense checkpoint, called `name`, of `shape`, made from `group`.

    `finish` takes the whole weight as the group gives it, float32, and returns the tensor (perhaps a view, perhaps the
    same memory changed); None where they are the same. What it needs is at most one more copy.
    """

    name: str
    group: TensorGroup
    shape: tuple[int, ...]
    finish: Finish | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a GGUF tensor goes: `part` of the `parts` that are joined along dimension 1 of an experts' tensor."""

    target: str
    finish: Finish | None = None
    part: int = 0
    parts: int = 0


class _Naming(Protocol):
    def place(self, name: str, shape: tuple[int, ...]) -> _Place | None:
        """Where the GGUF tensor `name` goes; None if transformers does not know."""


def pieces(checkpoint: Checkpoint, model: Any, groups: Iterable[TensorGroup]) -> tuple[list[Piece], dict[str, str]]:
    """What each tensor of a GGUF checkpoint becomes, and GGUF name → reason for those that become nothing.

    `model` is transformers' model of the rebuilt config, without weights. Names are those that transformers saves it
    by: of its state_dict, with one tensor for each expert where that is how such checkpoints are kept. No weight is
    read.
    Raise UnexpectedTensor for a tensor that has no place, CheckpointError for one that does not fit it.
    """
    assert checkpoint.quantization is not None
    architecture = str(checkpoint.config["model_type"])
    naming: _Naming = (
        _Mapped(model, architecture) if is_gguf_arch_supported(architecture) else _Legacy(model, architecture)
    )
    saved = _Saved(model)
    found: dict[str, Piece] = {}
    dropped: dict[str, str] = {}
    fused: dict[str, dict[int, TensorGroup]] = {}
    for group in groups:
        name, shape = group.dense_name, shape_of(group, checkpoint)
        place = naming.place(name, shape)
        if reason := _reason_to_drop(name, place, model):
            dropped[name] = reason
        elif place is None or not saved.holds(place.target):
            raise UnexpectedTensor(
                f"{name}: transformers has no place for it in a GGUF model of architecture {architecture}; "
                "upcast the original checkpoint instead"
            )
        elif place.parts:
            parts = fused.setdefault(place.target, {})
            _once(place.target, place.part in parts)
            parts[place.part] = group
            if len(parts) == place.parts:
                _add(found, saved.experts(place.target, [parts[i] for i in sorted(parts)], checkpoint), saved)
        else:
            done = shape if place.finish is None else _shape_after(place.finish, shape)
            piece = Piece(name=saved.name(place.target), group=group, shape=done, finish=place.finish)
            _add(found, [piece], saved)
    return list(found.values()), dropped


def shape_of(group: TensorGroup, checkpoint: Checkpoint) -> tuple[int, ...]:
    """The dense shape of a group."""
    assert checkpoint.quantization is not None
    if group.packed:
        return formats.load(FORMATS["gguf"]).dense_shape(group, checkpoint.quantization)
    return dense.dense_shape(group)


def whole(piece: Piece, checkpoint: Checkpoint) -> Tensor:
    """The dense tensor of a piece: float32, or as it is stored where it needs no arithmetic."""
    assert checkpoint.quantization is not None
    if piece.group.packed:
        tensor = formats.load(FORMATS["gguf"]).dequantize(piece.group, checkpoint.quantization)
    else:
        tensor = dense.dequantize(piece.group)
    return tensor if piece.finish is None else piece.finish(tensor)


class _Legacy:
    """The names and processors of modeling_gguf_pytorch_utils.py, which load_gguf_checkpoint loads by."""

    def __init__(self, model: Any, architecture: str) -> None:
        config = model.config.get_text_config()
        self._processor = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)(config=config.to_dict())
        try:
            self._names = legacy.get_gguf_hf_weights_map(model, self._processor)
        except (NotImplementedError, AttributeError) as error:
            raise CheckpointError(
                f"general.architecture {architecture}: transformers cannot map its tensors ({error}); upcast the "
                "original checkpoint instead"
            ) from error

    def place(self, name: str, shape: tuple[int, ...]) -> _Place | None:
        experts = legacy.Qwen2MoeTensorProcessor, legacy.MiniMaxM2TensorProcessor
        if isinstance(self._processor, experts) and (match := self._processor.GGUF_MOE_WEIGHTS_PATTERN.fullmatch(name)):
            target = self._names.get(match["name"])
            joined = match["w"] != "down"  # gate first, then up
            part, parts = int(match["w"] == "up"), 2 if joined else 1
            return _Place(target=target, part=part, parts=parts) if target else None
        # What a processor does is seen on ones that take no memory; where it does nothing it returns what it got.
        ones = np.broadcast_to(np.float32(1), shape)
        target, weights = self._process(name, ones)
        return (
            _Place(target=target, finish=None if weights is ones else partial(self._finish, name)) if target else None
        )

    def _finish(self, name: str, weight: Tensor) -> Tensor:
        return torch.from_numpy(self._process(name, weight.float().numpy())[1])

    def _process(self, name: str, weights: Any) -> tuple[str | None, Any]:
        stored: dict[str, dict[str, Tensor]] = {"tensors": {}}
        with np.errstate(invalid="ignore"):
            result = self._processor.process(
                weights=weights, name=name, tensor_key_mapping=self._names, parsed_parameters=stored
            )
        if result.name is None and len(stored["tensors"]) == 1:  # put where it goes already
            ((target, tensor),) = stored["tensors"].items()
            return target, tensor.numpy()
        return self._names.get(result.name), result.weights


class _Mapped:
    """The renamings and conversions of gguf_conversion_mapping.py, which the GGUF quantizer loads by."""

    def __init__(self, model: Any, architecture: str) -> None:
        mapping = deepcopy(get_gguf_conversion_mapping(architecture, model.config))
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def place(self, name: str, shape: tuple[int, ...]) -> _Place | None:  # noqa: ARG002 - the protocol's
        target, pattern = rename_source_key(name, self._renamings, self._converters)
        if pattern is None:
            return _Place(target=target, parts=int(".experts." in target))
        converter = self._by_pattern[pattern]
        sources = converter.source_patterns
        if len(sources) == 1:
            return _Place(target=target, finish=partial(_convert, converter.operations, pattern, target))
        (operation,) = converter.operations
        joins_rows = isinstance(operation, ConcatenateRows) and operation.dim == 1
        return _Place(target=target, part=sources.index(pattern), parts=len(sources)) if joins_rows else None


class _Saved:
    """The names that transformers saves a model's tensors by, and their shapes."""

    def __init__(self, model: Any) -> None:
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
            return [Piece(name=name, group=joined, shape=shape_of(joined, checkpoint), finish=None)]
        made = []
        for template, group in zip(templates, groups, strict=True):
            ((part, tensor),) = group.tensors.items()
            shape = shape_of(group, checkpoint)
            for i in range(shape[0] if len(shape) == 3 else 0):  # noqa: PLR2004
                name = str(apply_renamings(template.replace("*", str(i)), self._back))
                one = TensorGroup(module=group.module, dense_name=name, tensors={part: tensor[i]}, packed=group.packed)
                made.append(Piece(name=name, group=one, shape=shape[1:], finish=None))
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


def _add(found: dict[str, Piece], made: Iterable[Piece], saved: _Saved) -> None:
    for piece in made:
        _once(piece.name, piece.name in found)
        if piece.shape != saved.shapes.get(piece.name):
            expected = saved.shapes.get(piece.name)
            raise CheckpointError(
                f"{piece.group.dense_name}: gives {piece.name} the shape {list(piece.shape)}, but the file's metadata "
                f"describe {list(expected) if expected else 'none'}; the two do not belong together"
            )
        found[piece.name] = piece


def _once(name: str, twice: bool) -> None:  # noqa: FBT001
    if twice:
        raise UnexpectedTensor(f"{name}: is made from two tensors of the file; download it again")


def _reason_to_drop(name: str, place: _Place | None, model: Any) -> str:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None)
    if name in _ROPE_TENSORS and isinstance(rope, Mapping) and rope.get("rope_type") == _ROPE_TENSORS[name]:
        return "config.json says the same as rope_parameters"
    ignored = model._keys_to_ignore_on_load_unexpected or ()  # noqa: SLF001 - transformers' own list; none is public
    if place is not None and any(re.search(pattern, place.target) for pattern in ignored):
        return "the architecture ignores it"
    return ""


def _convert(operations: list[Any], pattern: str, target: str, weight: Tensor) -> Tensor:
    values: Any = {pattern: weight}
    for operation in operations:
        values = operation.convert(values, source_patterns=[pattern], target_patterns=[target])
    (value,) = values.values()
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _shape_after(finish: Finish, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(finish(torch.ones(()).expand(shape)).shape)


def _part(group: TensorGroup) -> str:
    """The ggml type of a group's only component."""
    ((part, tensor),) = group.tensors.items()
    return part if group.packed else {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[tensor.dtype]
