"""Which models a GGUF file can carry, so that llama.cpp and transformers both read the same model out of it.

From config.json and the names of the files alone. GGUF has no key for much of what a config says: what transformers and
llama.cpp then assume is in the table, and a model that differs from it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint import Checkpoint, architecture_of
from pipeline.companions import PROJECTOR
from pipeline.errors import UnsupportedFormat
from pipeline.gguf_vocabulary import check_vocabulary

_OTHERWISE = "quantize to bitsandbytes, GPTQ or AWQ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What GGUF calls a model_type, and what its readers take for granted of config.json."""

    name: str
    assumed: Mapping[str, Any]


_DENSE_ATTENTION = {"hidden_act": "silu", "attention_bias": False}
# model_type → its row. Each was read back by transformers 5.23 to the same logits; a Mistral comes back as a Llama.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(name="llama", assumed={**_DENSE_ATTENTION, "mlp_bias": False}),
    "mistral": Architecture(name="llama", assumed={"hidden_act": "silu", "sliding_window": None}),
    "qwen2": Architecture(name="qwen2", assumed={"hidden_act": "silu", "use_sliding_window": False}),
    # transformers reads no attention.key_length of a qwen3.
    "qwen3": Architecture(name="qwen3", assumed={**_DENSE_ATTENTION, "use_sliding_window": False, "head_dim": 128}),
}
# What transformers makes of Llama 3's rope_freqs.weight, which are factors alone.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# rope_type → what else it may say.
_SCALINGS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "yarn": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", *_LLAMA3}),
}


def check_writable(dense: Checkpoint, *, variant: str) -> None:
    """Raise UnsupportedFormat where a checkpoint has no place in a GGUF file, or only a part of it.

    `dense` is what is quantized or what it is made from. Of a GGUF file only the architecture is known here.
    """
    if dense.is_gguf:
        known = sorted({row.name for row in ARCHITECTURES.values()})
        if dense.model_type not in known:
            raise _refused(variant, f"architecture {dense.model_type} is not written, only {', '.join(known)}")
        return
    if PROJECTOR & set(dense.companions):
        raise _refused(variant, "the projector beside the model has no place in a GGUF file")
    check_config(dense.config, variant=variant)
    check_vocabulary(dense.folder, variant=variant)


def check_config(config: Mapping[str, Any], *, variant: str) -> None:
    """Raise UnsupportedFormat for a config that says what a GGUF file cannot; a key that is missing is right."""
    kind, name = str(config.get("model_type", "")), architecture_of(config)
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise _refused(variant, f"model_type {kind or 'none'} is not written to GGUF, only {known}")
    if name and not name.endswith("ForCausalLM"):
        raise _refused(variant, f"{name} is no causal language model, and its head has no place in a GGUF file")
    for key, value in ARCHITECTURES[kind].assumed.items():
        if (found := config.get(key, value)) != value:
            raise _refused(variant, f"config.json has {key} {found}, but readers of a GGUF {kind} take it as {value}")
    head, heads, hidden = (config.get(key) for key in ("head_dim", "num_attention_heads", "hidden_size"))
    if kind == "qwen2" and head is not None and heads is not None and head * heads != hidden:
        raise _refused(variant, f"config.json has head_dim {head}, but readers of a GGUF qwen2 divide hidden_size")
    _check_rope(config, variant=variant)


def rope_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """How positions are scaled, by the name that a config of any age has for it; `rope_type` is always there."""
    named = config.get("rope_parameters") or config.get("rope_scaling")
    said = named if isinstance(named, Mapping) else {}
    return {**said, "rope_type": said.get("rope_type", said.get("type", "default"))}


def _check_rope(config: Mapping[str, Any], *, variant: str) -> None:
    rope = rope_of(config)
    kind = rope["rope_type"]
    if kind not in _SCALINGS:
        raise _refused(variant, f"rope_type {kind} is not written to GGUF, only {', '.join(_SCALINGS)}")
    more = {key for key, value in rope.items() if value is not None} - _SCALINGS[kind]
    if more := more - {"rope_type", "type", "rope_theta"}:
        raise _refused(variant, f"rope_parameters say {min(more)}, for which GGUF has no key")
    for key, value in _LLAMA3.items() if kind == "llama3" else ():
        if (found := rope.get(key, value)) != value:
            raise _refused(variant, f"rope_parameters have {key} {found}, but a GGUF file is read as {value}")


def _refused(variant: str, why: str) -> UnsupportedFormat:
    return UnsupportedFormat(f"{variant}: {why}; {_OTHERWISE}")
