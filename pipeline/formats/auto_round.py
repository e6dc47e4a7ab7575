"""AutoRound: the tensors of GPTQ or AWQ under a config of its own.

`packing_format` says which (auto_round 0.16, export/export_to_autoround/export.py
`dynamic_import_quant_linear_for_packing`):

- `auto_round:auto_gptq`, `auto_round:gptq`: GPTQ v1, zero points stored minus one; what symmetric exports become.
- `auto_round`, `auto_round:gptqmodel`: GPTQ with zero points as they are, which is v2; the latter with g_idx.
- `auto_round:auto_awq`, `auto_round:awq`: AWQ GEMM.

`extra_config` gives modules other bits and group sizes: under a module's own name, or else under the first regular
expression found in it (inference/utils.py `_expand_regex_config`); what an entry does not say is as for all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import regex
from torch import Tensor

from pipeline.errors import CheckpointError, UnsupportedFormat
from pipeline.formats import awq, gptq
from pipeline.formats.components import ALL, matches
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

LAYOUTS = {
    "auto_round": "gptq_v2", "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq", "auto_round:gptq": "gptq", "auto": "gptq",
    "auto_round:auto_awq": "awq", "auto_round:awq": "awq",
}  # fmt: skip
DEFAULT = "auto_round:auto_gptq"  # inference/convert_model.py, where a config names none
FLOAT_BITS = 16  # and more: not quantized


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:
    """[O, I], as GPTQ or AWQ says."""
    own = own_quantization(group.module, quantization)
    return awq.dense_shape(group, own) if own.method == "awq" else gptq.dense_shape(group, own)


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
    """float32 [R, I], as GPTQ or AWQ computes it."""
    own = own_quantization(group.module, quantization)
    return awq.dequantize(group, own, rows) if own.method == "awq" else gptq.dequantize(group, own, rows)


def own_quantization(module: str, quantization: Quantization) -> Quantization:
    """The config of one module, in the terms of GPTQ or AWQ; raise UnsupportedFormat for a layout of neither."""
    layout = _layout(quantization)
    extra = _extra(module, quantization.raw.get("extra_config") or {})
    values = {**quantization.raw, **{key: value for key, value in extra.items() if value is not None}}
    try:
        _check_integers(module, values)
        bits, group_size = int(values.get("bits", 4)), int(values.get("group_size", 128))
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{module}: quantization_config.extra_config has an unreadable value ({error})"
        ) from error
    if bits >= FLOAT_BITS:
        raise CheckpointError(
            f"{module}: is packed, but quantization_config.extra_config says it has {bits} bits; fix config.json"
        )
    raw = {"version": "gemm"} if layout == "awq" else {"checkpoint_format": layout}
    method = "awq" if layout == "awq" else quantization.method
    return replace(quantization, method=method, bits=bits, group_size=group_size, raw=raw)


def _layout(quantization: Quantization) -> str:
    raw = quantization.raw
    # Before packing_format there was only backend, which names a kernel as well: auto_round:gptq:exllamav2.
    older = ":".join(str(raw.get("backend") or "auto").split(":")[:2])
    named = str(raw.get("packing_format") or (DEFAULT if older == "auto" else older))
    if named not in LAYOUTS:
        known = ", ".join(name for name in LAYOUTS if name != "auto")
        raise UnsupportedFormat(
            f"auto-round packed as {named} cannot be read, only {known}; export it again in one of these"
        )
    return LAYOUTS[named]


def _extra(module: str, extra: Any) -> Mapping[str, Any]:
    if not isinstance(extra, dict) or not all(isinstance(values, dict) for values in extra.values()):
        raise CheckpointError(
            "config.json: quantization_config.extra_config is no object of objects; download config.json again"
        )
    if module in extra:
        return dict(extra[module])
    for pattern, values in extra.items():
        try:
            regex.compile(pattern)
        except regex.error:
            continue  # as auto-round does: a name that is no pattern
        if values and matches(pattern, module, key="extra_config", anywhere=True):
            return dict(values)
    return {}


def _check_integers(module: str, values: Mapping[str, Any]) -> None:
    """Raise UnsupportedFormat where the codes are no integers, or the activations are not as the model makes them."""
    kind, activations = str(values.get("data_type") or "int"), values.get("act_bits") or FLOAT_BITS
    if kind != "int" or int(activations) < FLOAT_BITS or values.get("rotation_config"):
        found = "a rotation_config" if values.get("rotation_config") else f"{kind} and {activations}-bit activations"
        raise UnsupportedFormat(
            f"{module}: auto-round with {found} cannot be read, only int weights; load it with the auto-round library"
        )
