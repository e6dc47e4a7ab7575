"""Whether packed bytes that lie on disk are what a target would be written as, from configs and headers, without torch.

Strict: what a config leaves unsaid, or says of single modules, is not the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.catalog import format_to
from pipeline.checkpoint import Checkpoint
from pipeline.dense_shapes import dense_shape
from pipeline.errors import CheckpointError, UnsupportedFormat
from pipeline.quantization_config import Quantization
from pipeline.targets import (
    AWQTarget,
    BitsAndBytesTarget,
    CompressedTensorsTarget,
    GGUFTarget,
    GPTQTarget,
    Target,
    grid_of,
)

BLOCK, NESTED = 64, 256  # bitsandbytes: weights to an absmax, absmax to a nested one
WORD = 32  # bits of the int32 that codes are packed into
_ANY: tuple[int, ...] = (-1,)  # quant_state is JSON, as long as it is

_FLOATS = "BF16 F16 F32"
# compressed-tensors' scheme → its layout, the type of its codes, whether inputs are rounded too.
_SCHEMES: Mapping[str, tuple[str, str, bool]] = {
    "w4a16": ("pack-quantized", "int", False),
    "w8a8": ("int-quantized", "int", True),
    "fp8": ("float-quantized", "float", True),
}

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # component → dtype, or several with spaces between, and shape


def matches(target: Target, source: Checkpoint) -> bool:
    """Whether the packed modules of `source` are what `target` asks for, by its config and by its headers."""
    return same_grid(target, source.quantization) and laid_out(target, source)


def check_grid(target: Target, source: Checkpoint) -> None:
    """Raise UnsupportedFormat where a target is to keep a grid that its source does not have."""
    if (grid := grid_of(target)) != "fresh" and not matches(target, source):
        found = source.quantization.method if source.quantization else "dense"
        raise UnsupportedFormat(
            f"{target.variant}: grid {grid} needs a source that is packed as {target.format} with the same "
            f"options, but {source.path} is {found if found != target.format else 'packed with others'}; leave grid out"
        )


def same_options(target: Target, base: BitsAndBytesTarget) -> bool:
    """Whether a target asks for what `base` is, whatever their names."""
    return isinstance(target, BitsAndBytesTarget) and _spelt_out(target) == _spelt_out(base)


def same_grid(target: Target, quantization: Quantization | None) -> bool:
    """Whether a config says the format, layout, bits and groups of `target`, for every module alike.

    How the codes were chosen (damping, scale search, who rounded) is no part of it: bytes that stay are read alike.
    """
    if quantization is None or quantization.method != target.format:
        return False
    match target:
        case GGUFTarget():  # no GGUF block is kept: its tensors have other names
            return False
        case CompressedTensorsTarget():  # says its bits of each of its schemes
            return _same_compressed_tensors(target, quantization.raw)
        case BitsAndBytesTarget():
            return quantization.bits == target.bits and _same_bitsandbytes(target, quantization.raw)
        case GPTQTarget():
            return quantization.bits == target.bits and _same_gptq(target, quantization.raw)
        case AWQTarget():
            gemm = quantization.bits == target.bits and quantization.layout == "gemm"
            return gemm and _says(quantization.raw, zero_point=True, group_size=target.group_size)


def laid_out(target: Target, source: Checkpoint) -> bool:
    """Whether every packed module of `source` has the components, dtypes and shapes of `target`, and none is missing.

    The headers know what a config may not: other bits or groups of single modules, blocks of another size.
    """
    row = format_to(target)
    for module, parts in row.packed_modules(source.tensors).items():
        try:
            layout = _layout(target, dense_shape(source, row, module))
        except CheckpointError:
            return False
        if sorted(layout) != sorted(parts):
            return False
        for part, (dtype, shape) in layout.items():
            found = source.tensors[module + part]
            if found.dtype not in dtype.split() or shape not in {found.shape, _ANY}:
                return False
    return True


def _spelt_out(target: BitsAndBytesTarget) -> tuple[int, str, bool]:
    return target.bits, target.type or "nf4", target.double_quant is not False


def _same_bitsandbytes(target: BitsAndBytesTarget, raw: Mapping[str, Any]) -> bool:
    if target.bits == 8:  # noqa: PLR2004 - eight bits
        return not raw.get("llm_int8_has_fp16_weight") and raw.get("llm_int8_threshold", 6.0) == 6.0  # noqa: PLR2004 - the default
    return (
        raw.get("bnb_4bit_quant_type") == (target.type or "nf4")
        and bool(raw.get("bnb_4bit_use_double_quant")) == (target.double_quant is not False)
        and raw.get("bnb_4bit_quant_storage") in (None, "uint8")
    )


def _same_gptq(target: GPTQTarget, raw: Mapping[str, Any]) -> bool:
    return (
        _says(raw, group_size=target.group_size, sym=target.symmetric, desc_act=target.desc_act)
        and all(raw.get(key) in (None, "gptq") for key in ("checkpoint_format", "format"))
        and raw.get("pack_dtype") in (None, "int32")
        and not any(raw.get(key) for key in ("dynamic", "lm_head", "is_marlin_format"))
    )


def _same_compressed_tensors(target: CompressedTensorsTarget, raw: Mapping[str, Any]) -> bool:
    """One scheme for all modules, and no more than it needs: no cache, transform or outputs that are quantized."""
    layout, kind, rounds_inputs = _SCHEMES[target.scheme]
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return False
    (group,) = groups.values()
    if not isinstance(group, Mapping):  # the name of a preset
        return False
    weights, inputs = (group.get(key) or {} for key in ("weights", "input_activations"))
    own: dict[str, object] = {"num_bits": target.bits, "type": kind, "symmetric": True}
    if target.group_size != -1:
        own["group_size"] = target.group_size
    elif weights.get("group_size") not in (None, -1):
        return False
    tokens = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    return (
        _says(weights, strategy="channel" if target.group_size == -1 else "group", **own)
        and (_says(inputs, **tokens) if rounds_inputs else not inputs)
        # The order of rounding is none of the bytes; groups in another order have a weight_g_idx.
        and weights.get("actorder") in (None, "weight", "static")
        and _says(raw, format=layout, quantization_status="compressed")
        and group.get("format") in (None, layout)
        and not any(raw.get(key) for key in ("kv_cache_scheme", "sparsity_config", "transform_config"))
        and not any((weights.get("dynamic"), weights.get("scale_dtype"), group.get("output_activations")))
    )


def _says(raw: Mapping[str, Any], **options: object) -> bool:
    return all(type(raw.get(key)) is type(value) and raw[key] == value for key, value in options.items())


def _layout(target: Target, shape: tuple[int, ...]) -> Layout:
    """Component → dtype and shape of a module whose dense weight is [O, I]."""
    if len(shape) != 2:  # noqa: PLR2004 - a matrix
        return {}
    outputs, inputs = shape
    match target:
        case GGUFTarget():
            raise AssertionError("no GGUF target is compared")
        case BitsAndBytesTarget():
            return _bitsandbytes(target, outputs, inputs)
        case GPTQTarget():
            groups = -(-inputs // target.group_size) if target.group_size > 0 else 1
            return {
                ".qweight": ("I32", (inputs * target.code_bits // WORD, outputs)),
                ".qzeros": ("I32", (groups, outputs * target.code_bits // WORD)),
                ".scales": ("F16", (groups, outputs)),
                ".g_idx": ("I32", (inputs,)),
            }
        case AWQTarget():
            groups, words = -(-inputs // target.group_size), outputs * target.bits // WORD
            return {
                ".qweight": ("I32", (inputs, words)),
                ".qzeros": ("I32", (groups, words)),
                ".scales": ("F16", (groups, outputs)),
            }
        case CompressedTensorsTarget():
            return _compressed_tensors(target, outputs, inputs)


def _compressed_tensors(target: CompressedTensorsTarget, outputs: int, inputs: int) -> Layout:
    """Four bits: rows of whole words; eight: a code in each place."""
    groups = inputs // target.group_size if target.group_size > 0 else 1
    scales = {".weight_scale": (_FLOATS, (outputs, groups))}
    if target.scheme != "w4a16":
        return {".weight": ("I8" if target.scheme == "w8a8" else "F8_E4M3", (outputs, inputs)), **scales}
    words = -(-inputs * target.bits // WORD)
    return {".weight_packed": ("I32", (outputs, words)), ".weight_shape": ("I64", (2,)), **scales}


def _bitsandbytes(target: BitsAndBytesTarget, outputs: int, inputs: int) -> Layout:
    """Four bits: codes in pairs, a scale for each block, and where those are quantized too, theirs."""
    if target.bits == 8:  # noqa: PLR2004 - eight bits
        return {".weight": ("I8", (outputs, inputs)), ".SCB": ("F32", (outputs,)), ".weight_format": ("U8", ())}
    blocks = -(-outputs * inputs // BLOCK)
    nested = target.double_quant is not False
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        ".weight": ("U8", (-(-outputs * inputs // 2), 1)),
        ".weight.absmax": ("U8" if nested else "F32", (blocks,)),
        ".weight.quant_map": ("F32", (16,)),
        f".weight.quant_state.bitsandbytes__{target.type or 'nf4'}": ("U8", _ANY),
    }
    if nested:
        found[".weight.nested_absmax"] = ("F32", (-(-blocks // NESTED),))
        found[".weight.nested_quant_map"] = ("F32", (256,))
    return found
