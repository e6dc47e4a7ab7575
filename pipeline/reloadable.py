"""Which architectures transformers reloads from which format, so that none is quantized for hours and then refused.

Each row was run with gptqmodel 7.6 and transformers 5.23: what it says is what the library did. bitsandbytes reloads
every one of them; it keeps fused experts dense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pipeline.checkpoint import Checkpoint, architecture_of
from pipeline.errors import UnsupportedFormat
from pipeline.sizes import Sizes
from pipeline.targets import AWQTarget, GPTQTarget, Target, is_mixed, is_own

_SCALES = "transformers expects scales of its activations, which nobody writes"
_SPLIT = "gptqmodel splits its fused layers, transformers does not"
# model_type → what goes wrong, whoever rounds.
_NEITHER: Mapping[str, str] = {
    "gpt2": "its layers keep their weights transposed, which packed layers do not",
    "gpt_bigcode": "its code reads weights that packed layers do not have",
    "falcon": "transformers makes no packed layers of it",
    "mpt": "transformers does not find its layers",
}
_NO_AWQ: Mapping[str, str] = dict.fromkeys(("bloom", "gpt_neox", "gptj", "starcoder2"), _SCALES)
# What goes wrong with `engine: gptqmodel` alone.
_NOT_BY_GPTQMODEL: Mapping[str, str] = {
    "gpt_neox": "gptqmodel calls its output head by another name",
    "phi3": _SPLIT,
    "glm4": _SPLIT,
    "modernbert": "gptqmodel cannot read its config",
}
_NO_AWQ_BY_GPTQMODEL: Mapping[str, str] = {
    "cohere2": "gptqmodel moves no scales into its norms",
    "gemma3_text": "gptqmodel cannot run its layers one by one",
}
_BASE_MODEL = re.compile(r"(?<!Head)(?<!Heads)Model$")
_DECODER_LAYER = re.compile(r"(^|\.)(layers|h)\.\d+\.")


def check_reload(dense: Checkpoint, sizes: Sizes, target: Target) -> None:
    """Raise UnsupportedFormat where a target of this architecture would be written in vain.

    `dense` is what is quantized or what it is made from, `sizes` its dense shapes.
    """
    if not isinstance(target, GPTQTarget | AWQTarget):
        return
    kind, awq = dense.model_type, isinstance(target, AWQTarget)
    why, remedy = _NEITHER.get(kind) or (_NO_AWQ.get(kind) if awq else None), "quantize to bitsandbytes"
    if why is None and any(".experts." in f"{name}." for name in sizes.shapes):
        why = "transformers joins the experts of a layer, and finds none of those that are packed one by one"
    if why is None and _BASE_MODEL.search(architecture_of(dense.config)):
        why = "it is a base model, and what packs it looks for an output head"
    # A GGUF file calls its layers otherwise, whatever the architecture.
    decoder = dense.is_gguf or any(_DECODER_LAYER.search(name) for name in sizes.linears)
    if why is None and (dense.config.get("is_encoder_decoder") or not decoder):
        why = "it is no decoder, and only the layers of decoders are found again"
    if why is None and is_mixed(target):
        why, remedy = _mixed(dense, kind, sizes), "give bits as a number"
    if why is None and not is_own(target):
        why, remedy = _by_gptqmodel(kind, sizes, awq=awq), "leave engine: gptqmodel out"
    if why:
        raise UnsupportedFormat(
            f"{target.variant}: {kind or 'this architecture'} cannot be reloaded from {target.format} ({why}); {remedy}"
        )


def _mixed(dense: Checkpoint, kind: str, sizes: Sizes) -> str | None:
    """Different bits are loaded by gptqmodel alone, which knows language models, by its own names and fusions."""
    if not architecture_of(dense.config).endswith("ForCausalLM") and not dense.is_gguf:
        return "gptqmodel, which alone loads different bits, loads it as a causal language model"
    return _by_gptqmodel(kind, sizes, awq=False)


def _by_gptqmodel(kind: str, sizes: Sizes, *, awq: bool) -> str | None:
    why = _NOT_BY_GPTQMODEL.get(kind) or (_NO_AWQ_BY_GPTQMODEL.get(kind) if awq else None)
    fused = any(name.endswith(".gate_up_proj.weight") for name in sizes.shapes)
    return why or (_SPLIT if fused else None)
