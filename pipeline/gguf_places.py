"""Where transformers puts a GGUF tensor, and how it undoes what llama.cpp did to it.

That is transformers' own knowledge, in one of two places: integrations/gguf/gguf_conversion_mapping.py for the
architectures that it lists, modeling_gguf_pytorch_utils.py for the others. Neither is copied here: both are asked,
tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Protocol

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import modeling_gguf_pytorch_utils as legacy
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.integrations.gguf.gguf_conversion_mapping import ConcatenateRows
from transformers.integrations.gguf.utils import get_gguf_conversion_mapping, is_gguf_arch_supported

from pipeline.errors import CheckpointError, UnsupportedFormat

Finish = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a GGUF tensor goes: `part` of the `parts` that are joined along dimension 1 of an experts' tensor."""

    target: str
    finish: Finish | None = None
    part: int = 0
    parts: int = 0


class Naming(Protocol):
    """What transformers knows of an architecture."""

    def place(self, name: str, shape: tuple[int, ...]) -> Place | None:
        """Where the GGUF tensor `name` goes; None if transformers does not know."""

    def names(self) -> Mapping[str, str]:
        """The model's tensors → the names of the GGUF tensors that they are read from."""


def naming_of(model: Any, architecture: str) -> Naming:
    """The knowledge that transformers itself would load `model` by."""
    return _Mapped(model, architecture) if is_gguf_arch_supported(architecture) else _Legacy(model, architecture)


def undone(finish: Finish, weight: Tensor) -> Tensor:
    """The stored tensor [O, ...] that `finish` makes `weight` of: llama.cpp keeps the rows of some in another order.

    The order is asked of `finish`, with numbers for rows: 2 ** 24 of them are exact. Raise UnsupportedFormat where it
    does more than that.
    """
    moved = finish(torch.arange(len(weight), dtype=torch.float32).reshape(-1, *[1] * (weight.ndim - 1))).flatten()
    order = moved.long()
    if not torch.equal(order.sort().values, torch.arange(len(weight))) or not torch.equal(order.float(), moved):
        raise UnsupportedFormat(
            "transformers does more to a GGUF tensor of this architecture than put its rows in order; quantize to "
            "bitsandbytes, GPTQ or AWQ"
        )
    stored = torch.empty_like(weight)
    stored[order] = weight
    return stored


class _Legacy:
    """The names and processors of modeling_gguf_pytorch_utils.py, which load_gguf_checkpoint loads by."""

    def __init__(self, model: Any, architecture: str) -> None:
        config = model.config.get_text_config()
        self._processor = legacy.TENSOR_PROCESSORS.get(architecture, legacy.TensorProcessor)(config=config.to_dict())
        try:
            with _one_table():
                self._names = legacy.get_gguf_hf_weights_map(model, self._processor, model_type=architecture)
        except (NotImplementedError, AttributeError) as error:
            raise CheckpointError(
                f"general.architecture {architecture}: transformers cannot map its tensors ({error}); upcast the "
                "original checkpoint instead"
            ) from error

    def names(self) -> Mapping[str, str]:
        return {target: name for name, target in self._names.items()}

    def place(self, name: str, shape: tuple[int, ...]) -> Place | None:
        experts = legacy.Qwen2MoeTensorProcessor, legacy.MiniMaxM2TensorProcessor
        if isinstance(self._processor, experts) and (match := self._processor.GGUF_MOE_WEIGHTS_PATTERN.fullmatch(name)):
            target = self._names.get(match["name"])
            joined = match["w"] != "down"  # gate first, then up
            part, parts = int(match["w"] == "up"), 2 if joined else 1
            return Place(target=target, part=part, parts=parts) if target else None
        # What a processor does is seen on ones that take no memory; where it does nothing it returns what it got.
        ones = np.broadcast_to(np.float32(1), shape)
        target, weights = self._process(name, ones)
        return Place(target=target, finish=None if weights is ones else partial(self._finish, name)) if target else None

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


@contextmanager
def _one_table() -> Iterator[None]:
    """Have gguf make its table of names once: transformers asks for it anew for each module, minutes for 80 layers."""
    make = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = cache(make)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = make


class _Mapped:
    """The renamings and conversions of gguf_conversion_mapping.py, which the GGUF quantizer loads by."""

    def __init__(self, model: Any, architecture: str) -> None:
        mapping = deepcopy(get_gguf_conversion_mapping(architecture, model.config))
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}

    def names(self) -> Mapping[str, str]:
        raise NotImplementedError("no architecture of this kind is written")

    def place(self, name: str, shape: tuple[int, ...]) -> Place | None:  # noqa: ARG002 - the protocol's
        target, pattern = rename_source_key(name, self._renamings, self._converters)
        if pattern is None:
            return Place(target=target, parts=int(".experts." in target))
        converter = self._by_pattern[pattern]
        sources = converter.source_patterns
        if len(sources) == 1:
            return Place(target=target, finish=partial(_convert, converter.operations, pattern, target))
        (operation,) = converter.operations
        joins_rows = isinstance(operation, ConcatenateRows) and operation.dim == 1
        return Place(target=target, part=sources.index(pattern), parts=len(sources)) if joins_rows else None


def _convert(operations: list[Any], pattern: str, target: str, weight: Tensor) -> Tensor:
    values: Any = {pattern: weight}
    for operation in operations:
        values = operation.convert(values, source_patterns=[pattern], target_patterns=[target])
    (value,) = values.values()
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
