"""Which architectures transformers reloads from which format, so that none is quantized for hours and then refused.

Each row was run with gptqmodel 7.6, compressed-tensors 0.20 and transformers 5.23: what it says is what the library
did. bitsandbytes reloads every one of them; it keeps fused experts dense. compressed-tensors packs whatever
`torch.nn.Linear` there is, encoders and base models too. What vLLM makes of an architecture was not run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.checkpoint import Checkpoint, architecture_of
from pipeline.errors import UnsupportedFormat
from pipeline.gguf_writable import check_writable
from pipeline.sizes import Sizes
from pipeline.targets import AWQTarget, BitsAndBytesTarget, CompressedTensorsTarget, GGUFTarget, Target, is_mixed

_SPLIT = "gptqmodel splits its fused layers, transformers does not"
# model_type → what goes wrong, whoever rounds.
_NEITHER: Mapping[str, str] = {
    "gpt2": "its layers keep their weights transposed, which packed layers do not",
    "gpt_bigcode": "its code reads weights that packed layers do not have",
    "falcon": "transformers makes no packed layers of it",
    "mpt": "transformers does not find its layers",
}
# What goes wrong with `engine: gptqmodel` alone.
_NOT_BY_GPTQMODEL: Mapping[str, str] = {
    "gpt_neox": "gptqmodel calls its output head by another name",
    "phi3": _SPLIT,
    "glm4": _SPLIT,
    "modernbert": "gptqmodel cannot read its config",
}
_NO_AWQ_BY_GPTQMODEL: Mapping[str, str] = {
    "bloom": "gptqmodel cannot run its layers one by one",
    "cohere2": "gptqmodel moves no scales into its norms",
    "gemma3_text": "gptqmodel cannot run its layers one by one",
}
_READS = "its code reads weights that int4 layers do not have until they have run"
_NO_INT4: Mapping[str, str] = dict.fromkeys(("falcon", "gpt_bigcode", "mamba", "mamba2", "modernbert", "t5"), _READS)
_NOT_CALIBRATED: Mapping[str, str] = {"mamba": "it never calls one of its layers, so nothing is known of its inputs"}
_JOINED = "transformers joins the experts of a layer, and finds none of those that are packed one by one"
# Group sizes that gptqmodel gives torch's int4 kernel on a CPU, which knows 32, 64, 128 and 256; a whole row of 256
# weights runs by it, and gives wrong outputs where the grid is asymmetric. Others get another kernel.
_ON_CUDA = (-1, 16)
CUDA = Path("/dev/nvidiactl")
_BASE_MODEL = re.compile(r"(?<!Head)(?<!Heads)Model$")
_DECODER_LAYER = re.compile(r"(^|\.)(layers|h)\.\d+\.")


def check_reload(dense: Checkpoint, sizes: Sizes, target: Target) -> None:
    """Raise UnsupportedFormat where a target of this architecture would be written in vain.

    `dense` is what is quantized or what it is made from, `sizes` its dense shapes.
    """
    if isinstance(target, GGUFTarget):
        check_writable(dense, variant=target.variant)
    if isinstance(target, BitsAndBytesTarget | GGUFTarget):
        return
    kind, awq = dense.model_type, isinstance(target, AWQTarget)
    if isinstance(target, CompressedTensorsTarget):
        _check_compressed_tensors(dense, sizes, target)
        return
    why, remedy = _by_architecture(dense, sizes), "quantize to bitsandbytes"
    if why is None and is_mixed(target):
        why, remedy = _mixed(dense, kind, sizes), "give bits as a number"
    if why is None and target.engine == "gptqmodel":
        why, remedy = _by_gptqmodel(kind, sizes, awq=awq), "leave engine: gptqmodel out"
    if why is None and target.engine == "autoawq" and not architecture_of(dense.config).endswith("ForCausalLM"):
        why, remedy = "AutoAWQ loads every model as a causal language model", "leave engine: autoawq out"
    if why is None and target.bits == 4 and target.group_size in _ON_CUDA and not CUDA.exists():  # noqa: PLR2004 - four bits
        why = f"without a CUDA device, group_size {target.group_size} in 4 bits loads and cannot run"
        remedy = "choose 32, 64 or 128"
    _refuse(dense, target, why, remedy)


def _by_architecture(dense: Checkpoint, sizes: Sizes) -> str | None:
    """What is in the way of GPTQ and AWQ, whoever rounds."""
    if why := _NEITHER.get(dense.model_type):
        return why
    if any(".experts." in f"{name}." for name in sizes.shapes):
        return _JOINED
    if _BASE_MODEL.search(architecture_of(dense.config)):
        return "it is a base model, and what packs it looks for an output head"
    # A GGUF file calls its layers otherwise, whatever the architecture.
    decoder = dense.is_gguf or any(_DECODER_LAYER.search(name) for name in sizes.linears)
    if _has_encoder(dense) or not decoder:
        return "it is no decoder, and only the layers of decoders are found again"
    return None


def _check_compressed_tensors(dense: Checkpoint, sizes: Sizes, target: CompressedTensorsTarget) -> None:
    kind, int4 = dense.model_type, target.scheme == "w4a16"
    why, remedy = "its layers keep their weights transposed" if kind == "gpt2" else None, "quantize to bitsandbytes"
    if why is None and any(".experts." in f"{name}." for name in sizes.shapes):
        why = _JOINED
    if why is None and int4:
        # Calibrated on text alone, gemma3 keeps its vision tower dense, whose code it is.
        vision = _READS if kind == "gemma3" and not target.calibrated else None
        why, remedy = _NO_INT4.get(kind) or vision, "use scheme fp8"
    _refuse(dense, target, why, remedy)
    if target.calibrated:
        tokens = "its decoder would be given no tokens to calibrate on" if _has_encoder(dense) else None
        if reason := _NOT_CALIBRATED.get(kind) or tokens:
            raise UnsupportedFormat(
                f"{target.variant}: {kind} cannot be calibrated ({reason}); use scheme fp8, or rounding nearest"
            )


def _has_encoder(dense: Checkpoint) -> bool:
    return bool(dense.config.get("is_encoder_decoder"))


def _refuse(dense: Checkpoint, target: Target, why: str | None, remedy: str) -> None:
    if why:
        kind = dense.model_type or "this architecture"
        raise UnsupportedFormat(f"{target.variant}: {kind} cannot be reloaded from {target.format} ({why}); {remedy}")


def _mixed(dense: Checkpoint, kind: str, sizes: Sizes) -> str | None:
    """Different bits are loaded by gptqmodel alone, which knows language models, by its own names and fusions."""
    if not architecture_of(dense.config).endswith("ForCausalLM") and not dense.is_gguf:
        return "gptqmodel, which alone loads different bits, loads it as a causal language model"
    return _by_gptqmodel(kind, sizes, awq=False)


def _by_gptqmodel(kind: str, sizes: Sizes, *, awq: bool) -> str | None:
    why = _NOT_BY_GPTQMODEL.get(kind) or (_NO_AWQ_BY_GPTQMODEL.get(kind) if awq else None)
    fused = any(name.endswith(".gate_up_proj.weight") for name in sizes.shapes)
    return why or (_SPLIT if fused else None)
