"""What an architecture keeps: the tensors that its checkpoints hold, known from config.json without a weight."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """The tensors of an architecture, under the names that its checkpoints use.

    `tensors` maps each to the dtype and shape that transformers loads it in: some stay float32 whatever the model's
    dtype. `tied` maps a tensor to the one that it shares its values with. `optional` may be absent, `ignored` may be
    present: patterns that the architecture itself names. `transposed` modules keep their weight [I, O] (Conv1D, as in
    GPT-2), while packed formats keep [O, I].
    """

    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    tied: Mapping[str, str]
    optional: tuple[str, ...]
    ignored: tuple[str, ...]
    transposed: frozenset[str]

    def may_lack(self, name: str, present: set[str]) -> bool:
        """Whether `name` may be absent where the dense names `present` are there."""
        original = self.tied.get(name, name)
        family = {original, *(alias for alias, other in self.tied.items() if other == original)}
        return bool((family - {name}) & present) or any(re.search(pattern, name) for pattern in self.optional)

    def ignores(self, name: str) -> bool:
        """Whether the architecture itself says that a tensor of this name is of no use to it."""
        return any(re.search(pattern, name) for pattern in self.ignored)


def skeleton_of(checkpoint: Checkpoint, *, dtype: torch.dtype, trust_remote_code: bool) -> Skeleton:
    """The tensors that a dense checkpoint of this config holds in `dtype`; raise CheckpointError for an unknown config.

    The model is built on the meta device, and its names are turned back into those that checkpoints use (a fused expert
    becomes one tensor for each) by transformers' own rules for saving.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.pytorch_utils import Conv1D

    model = _build(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
    # transformers' own plan of what stays float32 (`_keep_in_fp32_modules`); None of it is public.
    plan = model._get_dtype_plan(dtype)  # noqa: SLF001
    wide = re.compile("|".join(f"(?:{pattern.replace('*', '.*')})" for pattern in plan)) if plan else None
    state = {
        name: tensor.to(torch.float32) if wide and tensor.is_floating_point() and wide.search(name) else tensor
        for name, tensor in model.state_dict().items()
    }
    names = {name for name, _ in model.named_buffers()}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ())]  # noqa: SLF001
    # Buffers that older checkpoints hold and newer architectures compute (modeling_utils `_adjust_missing_and_...`).
    ignored += [r"rotary_emb\.inv_freq"] if any(name.endswith("rotary_emb.inv_freq") for name in names) else []
    ignored += [r"(^|\.)position_ids$"] if any(name.endswith("position_ids") for name in names) else []
    saved = revert_weight_conversion(model, state)
    return Skeleton(
        tensors={name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in saved.items()},
        tied=dict(model.all_tied_weights_keys),
        optional=tuple(model._keys_to_ignore_on_load_missing or ()),  # noqa: SLF001
        ignored=tuple(ignored),
        transposed=frozenset(name for name, module in model.named_modules() if isinstance(module, Conv1D)),
    )


def _build(checkpoint: Checkpoint, *, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model without weights: the class that config.json names, or else a causal language model."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            names = checkpoint.config.get("architectures") or [""]
            named: Any = getattr(transformers, str(names[0]), None)
            known = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
            if known:
                return named._from_config(config, dtype=dtype)  # noqa: SLF001 - what AutoModel.from_config calls
            return transformers.AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a config from outside can make an architecture raise anything
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{checkpoint.path}/config.json: transformers cannot build model_type {checkpoint.model_type!r} from it "
            f"({reason}); a newer transformers may, or trust_remote_code if the model brings its own code"
        ) from error
