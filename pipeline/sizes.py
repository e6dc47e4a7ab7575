"""The dense shapes behind a checkpoint's tensors, read from headers alone, without torch.

The plan needs them before anything loads: do the groups divide the layers, and how much disk and memory will it take.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass

from pipeline.catalog import TORCHAO_TENSORS, Format, bits_per_weight
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, UnsupportedFormat
from pipeline.headers import TensorInfo
from pipeline.targets import AWQTarget, GPTQTarget, Target

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
WORD = 32  # bits of the int32 that codes are packed into
AWQ_OUTPUTS = 64  # gptqmodel's search for clipping bounds takes so many at a time; a packed word holds only 8
NOT_QUANTIZED = ("embed", "wte", "wpe", "lm_head", "norm", "router", "mlp.gate.", "score.", "classifier")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Dense tensor name → shape, as the upcast will write them."""

    shapes: dict[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        """Weights in all."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def largest(self) -> int:
        """Weights in the largest tensor."""
        return max((math.prod(shape) for shape in self.shapes.values()), default=0)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layer → [O, I] of the weights that a quantizer takes: two dimensions, no embedding, no lm_head."""
        return {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in self.shapes.items()
            if len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in NOT_QUANTIZED)  # noqa: PLR2004
        }

    def dense_bytes(self, dtype: str) -> int:
        """Bytes of all weights in `dtype`."""
        return self.parameters * BYTES[dtype]

    def quantized_bytes(self, target: Target, dtype: str) -> int:
        """Bytes of the weights with the linear layers quantized to `target`."""
        linear = sum(rows * columns for rows, columns in self.linears.values())
        return int(linear * bits_per_weight(target) / 8) + (self.parameters - linear) * BYTES[dtype]

    def adapter_bytes(self, rank: int) -> int:
        """Bytes of float32 LoRA weights of `rank` on every linear layer."""
        return sum(4 * rank * (rows + columns) for rows, columns in self.linears.values())


def dense_sizes(checkpoint: Checkpoint, row: Format) -> Sizes:
    """The shapes that the checkpoint dequantizes to."""
    shapes: dict[str, tuple[int, ...]] = {}
    packed = row.packed_modules(checkpoint.tensors)
    parts = {module + part for module, found in packed.items() for part in found}
    for module in packed:
        shapes[module + row.weight] = _dense_shape(checkpoint, row, module)
    shapes |= {name: info.shape for name, info in checkpoint.tensors.items() if name not in parts}
    return Sizes(shapes=shapes)


def check_target(sizes: Sizes, target: Target) -> None:
    """Raise UnsupportedFormat, naming the layer, where a target's groups or packed words do not fit a layer's sides."""
    if not isinstance(target, GPTQTarget | AWQTarget):
        return
    for module, (outputs, inputs) in sizes.linears.items():
        if target.group_size != -1 and inputs % target.group_size:
            fitting = [
                size for size in (16, 32, 64, 128) if all(side % size == 0 for _, side in sizes.linears.values())
            ]
            remedy = f"group sizes that fit: {', '.join(map(str, fitting))}" if fitting else "quantize to bitsandbytes"
            raise UnsupportedFormat(
                f"{target.variant}: group_size {target.group_size} does not divide the {inputs} inputs of {module}; "
                f"{remedy}"
            )
        if isinstance(target, AWQTarget):
            sides = [("outputs", outputs, AWQ_OUTPUTS)]
        else:  # codes are packed along the inputs, zero points along the outputs
            step = WORD if target.bits == 3 else WORD // target.bits  # noqa: PLR2004 - 32 codes of 3 bits share 3 words
            sides = [("inputs", inputs, step), ("outputs", outputs, step)]
        for side, count, step in sides:
            if count % step:
                raise UnsupportedFormat(
                    f"{target.variant}: the {count} {side} of {module} are no multiple of {step}, as gptqmodel's "
                    f"{target.format} needs; quantize to bitsandbytes"
                )


def _dense_shape(checkpoint: Checkpoint, row: Format, module: str) -> tuple[int, ...]:  # noqa: C901, PLR0911 - a case for each row
    def info(part: str) -> TensorInfo:
        return _info(checkpoint, f"{module}.{part}")

    assert checkpoint.quantization is not None
    match row.name:
        case "gptq":  # qweight [I·b/32, O] int32, scales [G, O]
            bits = _module_bits(checkpoint, module)
            return info("qweight").shape[1], info("qweight").shape[0] * 32 // bits
        case "awq":  # qweight [I, O/8] int32
            return info("qweight").shape[1] * 8, info("qweight").shape[0]
        case "awq-gemv":  # qweight [O, I/8] int32
            return info("qweight").shape[0], info("qweight").shape[1] * 8
        case "awq-gemv-fast":  # qweight [O/4, I] int16
            return info("qweight").shape[0] * 4, info("qweight").shape[1]
        case "auto-round":
            return _auto_round_shape(checkpoint, module)
        case "hqq":
            return _stored_integers(checkpoint, f"{module}.shape")
        case "torchao":
            return _torchao_shape(checkpoint, module)
        case "bnb-int8":
            return info("weight").shape
        case "bnb-4bit":
            return _quant_state_shape(checkpoint, module)
    raise AssertionError(row.name)


def _info(checkpoint: Checkpoint, name: str) -> TensorInfo:
    if name not in checkpoint.tensors:
        raise MissingTensor(f"{name}: is in no shard; the checkpoint is incomplete, download it again")
    return checkpoint.tensors[name]


def _auto_round_shape(checkpoint: Checkpoint, module: str) -> tuple[int, ...]:
    """As gptq, whose qzeros [G, O·b/32] tell the module's own bits, or as awq, whose qweight [I, O/8] is narrower."""
    qweight, scales, qzeros = (_info(checkpoint, f"{module}.{part}").shape for part in ("qweight", "scales", "qzeros"))
    inputs = qweight[0] * scales[1] // max(qzeros[1], 1) if qweight[1] == scales[1] else qweight[0]
    return scales[1], inputs


def _torchao_shape(checkpoint: Checkpoint, module: str) -> tuple[int, ...]:
    """The codes' own shape, where the header names a class that keeps one in each place."""
    assert checkpoint.quantization is not None
    described = checkpoint.quantization.metadata.get(f"{module}.weight", "")
    if not any(f'"{kind}"' in described for kind in TORCHAO_TENSORS):
        raise UnsupportedFormat(
            f"{module}: its header names none of torchao's {', '.join(TORCHAO_TENSORS)}, which alone can be read; load "
            "it with transformers and torchao on the device that it was packed for"
        )
    return _info(checkpoint, f"{module}._weight_qdata").shape


def _stored_integers(checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
    """The values of a small int64 tensor."""
    info = _info(checkpoint, name)
    if info.dtype != "I64":
        raise CheckpointError(f"{name}: is {info.dtype}, expected I64; download the checkpoint again")
    return struct.unpack(f"<{(info.end - info.start) // 8}q", _bytes(checkpoint, name, info))


def _bytes(checkpoint: Checkpoint, name: str, info: TensorInfo) -> bytes:
    with (checkpoint.path / checkpoint.weight_map[name]).open("rb") as file:
        file.seek(info.start)
        return file.read(info.end - info.start)


def _module_bits(checkpoint: Checkpoint, module: str) -> int:
    """A GPTQ module's own bits: words of a column over its codes, where g_idx tells how many codes there are."""
    assert checkpoint.quantization is not None
    g_idx, qweight = checkpoint.tensors.get(f"{module}.g_idx"), checkpoint.tensors[f"{module}.qweight"]
    return qweight.shape[0] * 32 // g_idx.shape[0] if g_idx and g_idx.shape[0] else checkpoint.quantization.bits


def _quant_state_shape(checkpoint: Checkpoint, module: str) -> tuple[int, ...]:
    """The shape in a bitsandbytes quant_state, which is JSON in a uint8 tensor."""
    prefix = f"{module}.weight.quant_state.bitsandbytes__"
    name = next((name for name in checkpoint.tensors if name.startswith(prefix)), None)
    if name is None:
        raise CheckpointError(f"{module}: has no quant_state tensor; the checkpoint is incomplete, download it again")
    raw = _bytes(checkpoint, name, checkpoint.tensors[name])
    try:
        return tuple(int(n) for n in json.loads(raw)["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name}: is no JSON with a shape ({error!r}); the checkpoint is damaged, download it again"
        ) from error
