"""The dense shapes behind a checkpoint's tensors, read from headers alone, without torch.

The plan needs them before anything loads: do the groups divide the layers, and how much disk and memory will it take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.catalog import Format, bits_per_weight
from pipeline.checkpoint import Checkpoint
from pipeline.dense_shapes import dense_shape
from pipeline.errors import UnsupportedFormat
from pipeline.gguf_headers import DENSE_TYPES
from pipeline.targets import AWQTarget, BitsAndBytesTarget, CompressedTensorsTarget, GGUFTarget, GPTQTarget, Target

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
WORD = 32  # bits of the int32 that codes are packed into
GGUF_BLOCK = 32  # weights that share a scale, in Q8_0 and Q4_0
KERNEL_OUTPUTS = 16  # torch's int4 kernel, by which 4 bits run on a CPU, takes so many; a packed word holds only 8
SEARCHED_OUTPUTS = 64  # gptqmodel's search for AWQ's clipping bounds takes so many at a time
NOT_QUANTIZED = (
    "embed", "wte", "wpe", "lm_head", "norm", "router", "mlp.gate.", "score.", "classifier",
    "token_embd", "position_embd", "ffn_gate_inp",  # GGUF's names
)  # fmt: skip


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
            if len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in NOT_QUANTIZED)  # noqa: PLR2004 - a matrix
        }

    def dense_bytes(self, dtype: str) -> int:
        """Bytes of all weights in `dtype`."""
        return self.parameters * BYTES[dtype]

    def quantized_bytes(self, target: Target, dtype: str) -> int:
        """Bytes of the weights with the linear layers quantized to `target`."""
        if isinstance(target, GGUFTarget):
            return self._gguf_bytes(target)
        linear = sum(rows * columns for rows, columns in self.linears.values())
        return int(linear * bits_per_weight(target) / 8) + (self.parameters - linear) * BYTES[dtype]

    def _gguf_bytes(self, target: GGUFTarget) -> int:
        """Every matrix is quantized, the embedding too; the output head, or what it is tied to, to Q8_0 at least."""
        matrices = {name: math.prod(shape) for name, shape in self.shapes.items() if len(shape) > 1}
        head = matrices.get("lm_head.weight") or max(matrices.values(), default=0)
        bits = bits_per_weight(target) * (sum(matrices.values()) - head) + 8.5 * head
        return int(bits / 8) + 4 * (self.parameters - sum(matrices.values()))

    def adapter_bytes(self, rank: int) -> int:
        """Bytes of float32 LoRA weights of `rank` on every linear layer."""
        return sum(4 * rank * (rows + columns) for rows, columns in self.linears.values())


def dense_sizes(checkpoint: Checkpoint, row: Format) -> Sizes:
    """The shapes that the checkpoint dequantizes to."""
    if checkpoint.is_gguf:
        return Sizes(shapes=_gguf_shapes(checkpoint))
    shapes: dict[str, tuple[int, ...]] = {}
    packed = row.packed_modules(checkpoint.tensors)
    parts = {module + part for module, found in packed.items() for part in found}
    for module, found in packed.items():
        shapes[row.dense_name(module, found)] = dense_shape(checkpoint, row, module)
    shapes |= {name: info.shape for name, info in checkpoint.tensors.items() if name not in parts}
    return Sizes(shapes=shapes)


def _gguf_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """GGUF headers have the dense shapes; the experts of a layer lie in one tensor [E, O, I], here each for itself."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, info in checkpoint.tensors.items():
        if name.endswith("_exps.weight") and len(info.shape) == 3:  # noqa: PLR2004 - experts stack to three dimensions
            module = name.removesuffix(".weight")
            shapes |= {f"{module}.{i}.weight": info.shape[1:] for i in range(info.shape[0])}
        else:
            shapes["lm_head.weight" if name == "output.weight" else name] = info.shape
    return shapes


def packed_modules(checkpoint: Checkpoint, row: Format) -> dict[str, tuple[str, ...]]:
    """Packed module → what follows it in the names of its tensors; in a GGUF file every packed tensor is one."""
    if checkpoint.is_gguf:
        return {name: ("",) for name, info in checkpoint.tensors.items() if info.dtype not in DENSE_TYPES}
    return row.packed_modules(checkpoint.tensors)


def check_target(sizes: Sizes, target: Target) -> None:
    """Raise UnsupportedFormat, naming the layer, where a target's groups or packed words do not fit a layer's sides."""
    if isinstance(target, GGUFTarget):
        _check_blocks(sizes, target)
    if isinstance(target, BitsAndBytesTarget | GGUFTarget):
        return
    compressed = isinstance(target, CompressedTensorsTarget)
    reader = "vLLM" if compressed else f"gptqmodel's {target.format}"
    for module, (outputs, inputs) in sizes.linears.items():
        if target.group_size != -1 and inputs % target.group_size:
            known = (32, 64, 128) if compressed else (16, 32, 64, 128)
            fitting = [size for size in known if all(side % size == 0 for _, side in sizes.linears.values())]
            otherwise = "take group_size -1" if compressed else "quantize to bitsandbytes"
            remedy = f"group sizes that fit: {', '.join(map(str, fitting))}" if fitting else otherwise
            raise UnsupportedFormat(
                f"{target.variant}: group_size {target.group_size} does not divide the {inputs} inputs of {module}; "
                f"{remedy}"
            )
        for side, count, step in _sides(target, outputs, inputs):
            if count % step:
                raise UnsupportedFormat(
                    f"{target.variant}: the {count} {side} of {module} are no multiple of {step}, as {reader} "
                    "needs; quantize to bitsandbytes"
                )


def _check_blocks(sizes: Sizes, target: GGUFTarget) -> None:
    """Raise UnsupportedFormat for a matrix whose rows do not divide into GGUF's blocks."""
    for name, shape in sizes.shapes.items():
        if len(shape) > 1 and shape[-1] % GGUF_BLOCK:
            raise UnsupportedFormat(
                f"{target.variant}: the {shape[-1]} inputs of {name.removesuffix('.weight')} are no multiple of the "
                f"{GGUF_BLOCK} weights in a GGUF block; quantize to bitsandbytes"
            )


def _sides(
    target: GPTQTarget | AWQTarget | CompressedTensorsTarget, outputs: int, inputs: int
) -> Iterator[tuple[str, int, int]]:
    """(side, its length, what that must be a multiple of) of a layer that is packed and run."""
    several = target.candidates if isinstance(target, GPTQTarget) else (target.bits,)
    word = max(map(_word_step, several))
    kernel = max(word, KERNEL_OUTPUTS) if 4 in several else word  # noqa: PLR2004 - four bits
    match target:
        case CompressedTensorsTarget(scheme="w4a16"):  # vLLM makes room for whole words
            yield "inputs", inputs, word
        case GPTQTarget():  # codes are packed along the inputs, zero points along the outputs
            yield "inputs", inputs, word
            yield "outputs", outputs, kernel
        case AWQTarget():
            yield "outputs", outputs, SEARCHED_OUTPUTS if target.engine == "gptqmodel" else kernel


def _word_step(bits: int) -> int:
    """Codes that fill whole words: of 3 bits, 32 share three."""
    return WORD if bits == 3 else WORD // bits  # noqa: PLR2004 - three bits
