"""Packing for compressed-tensors: the library's own schemes and compressors, given weights that lie on their grid.

A compressor divides a weight by its scales and rounds. It is given, in float32, the very numbers that the codes stand
for, so that what it finds are those codes, whoever chose them; in the scales' dtype (bfloat16 has 8 significant bits)
the quotients of 8-bit codes would already be off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import NonFinite
from pipeline.formats.components import all_finite
from pipeline.formats.rounded import Rounded
from pipeline.targets import CompressedTensorsTarget

# Scheme → the library's preset of it (quantization/quant_scheme.py) and the layout that its compressors make of it.
PRESETS = {
    "w4a16": ("W4A16", "pack-quantized"),
    "w8a8": ("W8A8", "int-quantized"),
    "fp8": ("FP8_DYNAMIC", "float-quantized"),
}


def scheme_of(target: CompressedTensorsTarget) -> Any:
    """The library's QuantizationScheme for a target: every linear module, w4a16 in groups of the target's size."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

    preset, layout = PRESETS[target.scheme]
    found = preset_name_to_scheme(preset, ["Linear"]).model_dump()
    if target.scheme == "w4a16":
        whole = target.group_size == -1
        grouped = {"strategy": "channel" if whole else "group", "group_size": None if whole else target.group_size}
        found["weights"] = QuantizationArgs(**{**found["weights"], **grouped}).model_dump()
    return QuantizationScheme(**{**found, "format": layout})


def config_of(target: CompressedTensorsTarget, ignore: Sequence[str]) -> dict[str, Any]:
    """The library's quantization_config as JSON has it; the modules in `ignore` are dense."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    scheme = scheme_of(target)
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, format=str(scheme.format), ignore=[*ignore],
        quantization_status=QuantizationStatus.COMPRESSED,
    )  # fmt: skip
    found: dict[str, Any] = config.model_dump(mode="json")
    return found


def pack(rounded: Rounded, scheme: Any) -> dict[str, Tensor]:
    """Symmetric `rounded` as the tensors of its layout; `dequantize` gives its `dense()` back.

    weight_packed, weight_scale and weight_shape for fewer than 8 bits, else weight int8 and weight_scale. On the CPU,
    since on others the library runs kernels that want a compiler.
    """
    return _compressed(rounded.dense().cpu(), rounded.scales.cpu(), scheme)


def pack_floats(weight: Tensor, scheme: Any, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """float32 `weight` [O, I] as float8_e4m3fn and weight_scale [O, 1] in `dtype`: each output's largest becomes 448.

    Codes are the nearest for the scale as it is stored. Raise NonFinite where a scale is beyond `dtype`, or a weight no
    number.
    """
    scales = (weight.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max).to(dtype)
    if not all_finite(scales):
        raise NonFinite(
            f"the weights hold NaN, or values that no {str(dtype).removeprefix('torch.')} scale reaches; train again "
            "with a lower learning rate, or quantize to bitsandbytes"
        )
    scales = scales.masked_fill_(scales == 0, 1)  # a row of zeros
    return _compressed(weight.cpu(), scales.cpu(), scheme)


def _compressed(weight: Tensor, scales: Tensor, scheme: Any) -> dict[str, Tensor]:
    from compressed_tensors.compressors import BaseCompressor

    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    found: dict[str, Tensor] = compressor.compress({"weight": weight, "weight_scale": scales}, scheme)
    return found
