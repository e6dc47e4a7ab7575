"""The dense shape behind a packed module, from headers and the bytes of tiny tensors, without torch.

The plan needs it before anything loads. The formats' own modules check the same shapes against every component.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

from pipeline.catalog import TORCHAO_TENSORS, Format
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, UnsupportedFormat
from pipeline.headers import TensorInfo

Shape = tuple[int, ...]
WORD = 32  # bits of the int32 that codes are packed into


def dense_shape(checkpoint: Checkpoint, row: Format, module: str) -> Shape:
    """The shape of what a packed module becomes; raise an InputError where its header describes none."""
    try:
        return _SHAPES[row.name](checkpoint, module)
    except (ValueError, IndexError, ZeroDivisionError, struct.error, KeyError) as error:  # of another rank, or empty
        raise CheckpointError(
            f"{module}: its header describes no {row.title} weight ({error}); the checkpoint is incomplete, download "
            "it again"
        ) from error


def _info(checkpoint: Checkpoint, name: str) -> TensorInfo:
    if name not in checkpoint.tensors:
        raise MissingTensor(f"{name}: is in no shard; the checkpoint is incomplete, download it again")
    return checkpoint.tensors[name]


def _read(checkpoint: Checkpoint, name: str) -> bytes:
    """The bytes of a small tensor."""
    info = _info(checkpoint, name)
    with (checkpoint.path / checkpoint.weight_map[name]).open("rb") as file:
        file.seek(info.start)
        return file.read(info.end - info.start)


def _integers(checkpoint: Checkpoint, name: str) -> Shape:
    """The values of a small tensor of int64 or int32."""
    info = _info(checkpoint, name)
    kinds = {"I64": (8, "q"), "I32": (4, "i")}
    if info.dtype not in kinds:
        raise CheckpointError(f"{name}: is {info.dtype}, expected I64; download the checkpoint again")
    size, kind = kinds[info.dtype]
    return struct.unpack(f"<{(info.end - info.start) // size}{kind}", _read(checkpoint, name))


def _gptq(checkpoint: Checkpoint, module: str) -> Shape:
    """From qweight [I * b / 32, O], where g_idx [I] tells a module's own bits."""
    assert checkpoint.quantization is not None
    rows, outputs = _info(checkpoint, f"{module}.qweight").shape
    g_idx = checkpoint.tensors.get(f"{module}.g_idx")
    bits = rows * WORD // g_idx.shape[0] if g_idx and g_idx.shape[0] else checkpoint.quantization.bits
    return outputs, rows * WORD // bits


def _awq(checkpoint: Checkpoint, module: str) -> Shape:
    """From qweight [I, O / 8]."""
    inputs, words = _info(checkpoint, f"{module}.qweight").shape
    return words * 8, inputs


def _awq_gemv(checkpoint: Checkpoint, module: str) -> Shape:
    """From qweight [O, I / 8]."""
    outputs, words = _info(checkpoint, f"{module}.qweight").shape
    return outputs, words * 8


def _awq_gemv_fast(checkpoint: Checkpoint, module: str) -> Shape:
    """From qweight int16 [O / 4, I]."""
    fours, inputs = _info(checkpoint, f"{module}.qweight").shape
    return fours * 4, inputs


def _auto_round(checkpoint: Checkpoint, module: str) -> Shape:
    """As gptq, whose qzeros [G, O·b/32] tell the module's own bits, or as awq, whose qweight [I, O/8] is narrower."""
    qweight, scales, qzeros = (_info(checkpoint, f"{module}.{part}").shape for part in ("qweight", "scales", "qzeros"))
    inputs = qweight[0] * scales[1] // qzeros[1] if qweight[1] == scales[1] else qweight[0]
    return scales[1], inputs


def _hqq(checkpoint: Checkpoint, module: str) -> Shape:
    """As stored beside the codes."""
    return _integers(checkpoint, f"{module}.shape")


def _torchao(checkpoint: Checkpoint, module: str) -> Shape:
    """The codes' own shape, where the header names a class that keeps one in each place."""
    assert checkpoint.quantization is not None
    described = checkpoint.quantization.metadata.get(f"{module}.weight", "")
    if not any(f'"{kind}"' in described for kind in TORCHAO_TENSORS):
        raise UnsupportedFormat(
            f"{module}: its header names none of torchao's {', '.join(TORCHAO_TENSORS)}, which alone can be read; load "
            "it with transformers and torchao on the device that it was packed for"
        )
    return _info(checkpoint, f"{module}._weight_qdata").shape


def _compressed_tensors(checkpoint: Checkpoint, module: str) -> Shape:
    """From the weight itself, or from packed int32 [O, W] and what weight_shape holds, or bytes [O, B] and scales."""
    packed = checkpoint.tensors.get(f"{module}.weight_packed")
    if packed is None:
        return _info(checkpoint, f"{module}.weight").shape
    outputs, count = packed.shape
    if packed.dtype == "I32":
        return _integers(checkpoint, f"{module}.weight_shape")
    # Bytes for each scale: 8 hold 16 codes (NVFP4), 16 hold 32 (MXFP4), 24 hold 32 of six bits (MXFP6).
    codes = {8: 16, 16: 32, 24: 32}
    groups = _info(checkpoint, f"{module}.weight_scale").shape[1]
    return outputs, groups * codes[count // groups]


def _fp8(checkpoint: Checkpoint, module: str) -> Shape:
    """From the weight itself; int8 holds two codes of four bits in a byte."""
    info = checkpoint.tensors.get(f"{module}.weight") or _info(checkpoint, module)
    return (*info.shape[:-1], 2 * info.shape[-1]) if info.dtype in {"I8", "U8"} else info.shape


def _mxfp4(checkpoint: Checkpoint, module: str) -> Shape:
    """From blocks [E, O, I / 32, 16], transposed."""
    experts, outputs, groups, _ = _info(checkpoint, f"{module}_blocks").shape
    return experts, groups * 32, outputs


def _bnb_int8(checkpoint: Checkpoint, module: str) -> Shape:
    """The codes' own shape."""
    return _info(checkpoint, f"{module}.weight").shape


def _bnb_4bit(checkpoint: Checkpoint, module: str) -> Shape:
    """The shape in a bitsandbytes quant_state, which is JSON in a uint8 tensor."""
    prefix = f"{module}.weight.quant_state.bitsandbytes__"
    name = next((name for name in checkpoint.tensors if name.startswith(prefix)), None)
    if name is None:
        raise CheckpointError(f"{module}: has no quant_state tensor; the checkpoint is incomplete, download it again")
    try:
        return tuple(int(n) for n in json.loads(_read(checkpoint, name))["shape"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{name}: is no JSON with a shape ({error!r}); the checkpoint is damaged, download it again"
        ) from error


_SHAPES: dict[str, Callable[[Checkpoint, str], Shape]] = {
    "bnb-4bit": _bnb_4bit,
    "bnb-int8": _bnb_int8,
    "gptq": _gptq,
    "awq": _awq,
    "awq-gemv": _awq_gemv,
    "awq-gemv-fast": _awq_gemv_fast,
    "auto-round": _auto_round,
    "hqq": _hqq,
    "torchao": _torchao,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "modelopt": _fp8,
    "mxfp4": _mxfp4,
}
