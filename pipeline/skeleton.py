"""What an architecture expects of a checkpoint, known from config.json without a weight.

The model is built on the meta device, and transformers' own loader tells where each tensor of a checkpoint goes: under
another name, with or without the base model's prefix, or fused with others (the experts of a layer). Nothing is guessed
from names, and what the loader would report as missing, unexpected or mismatched is known before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import read_json
from pipeline.errors import CheckpointError, InputError, MissingTensor
from pipeline.model_class import class_of
from pipeline.pieces import Piece

# Config keys whose value is a number of modules: transformers makes as many objects, however large the number is.
_COUNTS = re.compile(r"(^|_)(n|num)_.*(layer|expert|block|depth|stage)s?$|^n_?layers?$|^depth$|layers?$")
_MOST_MODULES = 100_000
# Parameters that a model may have beside four for each stored tensor: they multiply (layers times experts), and each
# takes a fifth of a millisecond. A checkpoint whose config.json asks for so many more than it holds lacks most of them.
_MOST_PARAMETERS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a checkpoint's tensor goes in the model, and the dtype it is loaded in.

    Some tensors stay float32 whatever the model's dtype. `transposed` says that the module keeps its weight [I, O]
    (Conv1D, as in GPT-2), while packed formats keep [O, I].
    """

    parameter: str
    dtype: torch.dtype
    transposed: bool


class Skeleton:
    """A model without weights, and what transformers' loader makes of a checkpoint's names and shapes."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
        from transformers.pytorch_utils import Conv1D

        self.model = model
        self._dtype = dtype
        self._state: dict[str, torch.Tensor] = dict(model.state_dict())
        self._mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        self._transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
        # transformers' own plan of what stays float32 (`_keep_in_fp32_modules`); none of it is public.
        self._plan = model._get_dtype_plan(dtype)  # noqa: SLF001
        self._wide = _any_of(pattern.replace("*", ".*") for pattern in self._plan)
        names = {name for name, _ in model.named_buffers()}
        ignored = [*(model._keys_to_ignore_on_load_unexpected or ())]  # noqa: SLF001
        # Buffers that older checkpoints hold and newer architectures compute (modeling_utils, `_adjust_missing_...`).
        ignored += [r"rotary_emb\.inv_freq"] if any(name.endswith("rotary_emb.inv_freq") for name in names) else []
        ignored += [r"(^|\.)position_ids$"] if any(name.endswith("position_ids") for name in names) else []
        self._ignored = _any_of(ignored)
        self._optional = _any_of(model._keys_to_ignore_on_load_missing or ())  # noqa: SLF001

    @property
    def parameters(self) -> Mapping[str, torch.Tensor]:
        """The model's own tensors, on the meta device."""
        return self._state

    def place(self, name: str) -> Place | None:
        """Where the dense tensor `name` goes, or None where the model has no place for it."""
        parameter = self._renamed(name)
        if parameter not in self._state:
            return None
        dtype = self._state[parameter].dtype
        if dtype.is_floating_point and self._wide(parameter):
            dtype = torch.float32
        return Place(parameter=parameter, dtype=dtype, transposed=parameter.rpartition(".")[0] in self._transposed)

    def ignores(self, name: str) -> bool:
        """Whether the architecture itself says that a tensor of this name is of no use to it."""
        return self._ignored(self._renamed(name))

    def problems(self, pieces: Iterable[Piece]) -> Iterator[InputError]:
        """What `from_pretrained` would report of a dense checkpoint of these pieces.

        Each is an error that names one tensor. The loader itself is run, on tensors that hold no memory; after it the
        skeleton is of no more use.
        """
        found = self._load({piece.name: torch.empty(piece.shape, dtype=piece.dtype, device="meta") for piece in pieces})
        for name, has, expected in sorted(found.mismatched_keys, key=str):
            yield CheckpointError(
                f"{name}: has shape {list(has)}, but config.json describes {list(expected)}; the two do not belong "
                "together"
            )
        for name, reason in sorted(found.conversion_errors.items()):
            said = " ".join(str(reason).split())[:200]
            yield CheckpointError(f"{name}: its parts do not fit together as config.json describes them ({said})")
        lacking = set(found.missing_keys)
        for name in (name for name in self._state if name in lacking):
            if not self._optional(name) and not any(alias not in lacking for alias in self._family(name)):
                yield MissingTensor(f"{name}: is in no shard; the checkpoint is incomplete, download it again")

    def _renamed(self, name: str) -> str:
        """What the loader calls the checkpoint's tensor `name`; for one of several that it joins, their common name."""
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        parameter: str = rename_source_key(name, self._renamings, self._converters, prefix, self._state)[0]
        if parameter not in self._state and name in self._state:
            parameter = rename_source_key(name, [], [], prefix, self._state)[0]
        return parameter

    def _load(self, state: Mapping[str, torch.Tensor]) -> Any:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        given = LoadStateDictConfig(
            device_map={"": "meta"}, dtype=self._dtype, dtype_plan=self._plan, weight_mapping=self._mapping
        )
        found, _ = convert_and_load_state_dict_in_model(self.model, dict(state), given)
        return found

    def _family(self, name: str) -> set[str]:
        """The tensors that share their values with `name`: one of them stored is enough."""
        tied: Mapping[str, str] = self.model.all_tied_weights_keys
        original = tied.get(name, name)
        return {original, *(alias for alias, other in tied.items() if other == original)} - {name}


def skeleton_of(folder: Path, *, dtype: torch.dtype, trust_remote_code: bool, stored: int) -> Skeleton:
    """The skeleton of the architecture that a folder's config.json describes, in `dtype`.

    Raise CheckpointError for a config that transformers cannot build a model from, or one of far more parameters than
    the `stored` tensors can be.
    """
    import transformers

    said = read_json(folder / "config.json")
    _check_counts(folder, said)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"), _at_most(4 * stored + _MOST_PARAMETERS, folder):
            return Skeleton(_build(said, config, dtype=dtype, trust_remote_code=trust_remote_code), dtype)
    except CheckpointError:
        raise
    except Exception as error:  # a config from outside can make an architecture raise anything
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder}/config.json: transformers cannot build model_type {said.get('model_type')!r} from it "
            f"({reason}); a newer transformers may, or trust_remote_code if the model brings its own code"
        ) from error


def hollow(folder: Path, *, trust_remote_code: bool) -> Any:
    """The model of a folder's config.json in float32: parameters on the meta device, buffers as it computes them.

    For checkpoints whose skeleton was built before: nothing is checked here.
    """
    import transformers
    from accelerate import init_empty_weights

    said = read_json(folder / "config.json")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False), torch.device("cpu"):
        return _build(said, config, dtype=torch.float32, trust_remote_code=trust_remote_code)


def _build(said: Mapping[str, Any], config: Any, *, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model without weights."""
    make = class_of(said, trust_remote_code=trust_remote_code)
    if hasattr(make, "_from_config"):
        return make._from_config(config, dtype=dtype)  # noqa: SLF001 - what AutoModel.from_config calls
    return make.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


@contextmanager
def _at_most(limit: int, folder: Path) -> Iterator[None]:
    """Raise CheckpointError as soon as the modules that are made in the block have more parameters than `limit`."""
    count = 0

    def look(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise CheckpointError(
                f"{folder}/config.json: describes a model of more than {limit} parameter tensors, far more than the "
                "checkpoint holds; download config.json again"
            )

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _check_counts(folder: Path, said: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a config that would have transformers build modules for hours."""

    def look(values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                look(value)
            elif isinstance(value, int) and value > _MOST_MODULES and _COUNTS.search(key):
                raise CheckpointError(
                    f"{folder}/config.json: {key} is {value}, more than any model has; download config.json again"
                )

    look(said)


def _any_of(patterns: Any) -> Callable[[str], bool]:
    """Whether one of an architecture's own patterns is found in a name."""
    joined = "|".join(f"(?:{pattern})" for pattern in patterns)
    compiled = re.compile(joined) if joined else None
    return lambda name: bool(compiled and compiled.search(name))
