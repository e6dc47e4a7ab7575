"""The table of formats, without torch: what each is called, what it is made of, what can be done with it.

A new format is one row here, one file in `pipeline/formats/`, and one test file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import UnsupportedFormat
from pipeline.quantization_config import Quantization
from pipeline.targets import AWQTarget, BitsAndBytesTarget, CompressedTensorsTarget, GGUFTarget, GPTQTarget, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A way for weights to lie on disk.

    A module is packed when the tensor `<module><marker>` exists for one of the markers; its packed tensors are
    `<module><component>`, and together they become the dense tensor `<module><weight>`. A component that ends in `*`
    stands for every name that begins so. A module whose weight goes by the module's own name (component "") becomes the
    tensor `<module>`. `needs`, if any, are components of which a module has one, or else its marker means something
    else. `leftovers` end the names of what quantized activations need and a dense model has no place for;
    `activations` is what the format's kernels round a layer's inputs to. `methods` are the `quant_method`s that the row
    reads, with these `bits` (none: any) and in these `layouts` (none: any); `otherwise` says what else reads others.
    """

    name: str
    title: str
    methods: tuple[str, ...]
    module: str
    markers: tuple[str, ...]
    components: tuple[str, ...]
    bits: tuple[int, ...] = ()
    layouts: tuple[str, ...] = ()
    otherwise: str = "use the library that wrote it"
    weight: str = ".weight"
    activations: Literal["", "int8", "float8"] = ""
    needs: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()
    dequantize: str
    train: str
    quantize: str
    reload: str
    libraries: tuple[str, ...] = ()

    @property
    def writable(self) -> bool:
        """Whether the quantize stage writes it."""
        return self.name != "dense" and self.quantize != "no"

    def packed_modules(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Module → its components among tensor `names`, sorted; module and component joined are the tensor's name."""
        names = set(names)
        modules: dict[str, list[str]] = {}
        for name in names:
            marker = next((marker for marker in self.markers if name.endswith(marker)), None)
            if marker is not None:
                modules[name.removesuffix(marker)] = []
        for name in names if modules else ():
            for component in self.components:
                stem = component.rstrip("*")
                cut = name.rfind(stem) if stem != component else len(name) - len(stem) if name.endswith(stem) else -1
                if cut >= 0 and name[:cut] in modules:
                    modules[name[:cut]].append(name[cut:])
                    break
        return {
            module: tuple(sorted(found))
            for module, found in sorted(modules.items())
            if not self.needs or any(part in self.needs for part in found)
        }

    def dense_name(self, module: str, parts: Iterable[str]) -> str:
        """The dense tensor that a module's components become together."""
        return module if "" in parts else module + self.weight


DENSE = Format(
    name="dense", title="bf16, fp16, fp32", methods=(), module="pipeline.formats.dense", markers=(), components=(),
    bits=(16, 32), dequantize="copied or cast", train="every method", quantize="the upcast stage",
    reload="transformers",
)  # fmt: skip

# torchao's tensor classes that keep one element in each place; its headers name a tensor's class.
TORCHAO_TENSORS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
# What hqq stores beside the codes (hqq, core/quantize.py `HQQLinear.state_dict_keys`); the bias stays dense.
HQQ_PARTS = (
    ".scale", ".zero", ".nbits", ".group_size", ".shape", ".axis", ".packing", ".unpack_view_dtype", ".view_as_float",
    ".quant_scale", ".quant_zero", ".compute_dtype", ".offload_meta", ".encoded_state_dict", ".stores_quant_config",
    ".channel_wise", ".optimize", ".round_zero",
)  # fmt: skip

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        DENSE,
        Format(
            name="bnb-4bit", title="bitsandbytes NF4, FP4", methods=("bitsandbytes",),
            module="pipeline.formats.bnb_4bit",
            markers=(".weight.absmax",), components=(".weight", ".weight.*"), bits=(4,),
            dequantize="NF4, FP4, with and without double quantization", train="adapters, heads; all after upcast",
            quantize="written directly",
            reload="transformers + bitsandbytes", libraries=("bitsandbytes",),
        ),
        Format(
            name="bnb-int8", title="bitsandbytes int8", methods=("bitsandbytes",), module="pipeline.formats.bnb_int8",
            markers=(".SCB",), components=(".weight", ".SCB", ".weight_format"), bits=(8,),
            dequantize="row-major", train="adapters, heads; all after upcast", quantize="written directly",
            reload="transformers + bitsandbytes", libraries=("bitsandbytes",), activations="int8",
        ),
        Format(
            name="gptq", title="GPTQ", methods=("gptq",), module="pipeline.formats.gptq",
            markers=(".qweight",), components=(".qweight", ".qzeros", ".scales", ".g_idx"), bits=(2, 3, 4, 8),
            dequantize="v1 and v2, any group size, desc_act, symmetric or not",
            train="adapters, heads; all after upcast", quantize="one calibration pass",
            reload="transformers + optimum + gptqmodel", libraries=("gptqmodel", "optimum"),
        ),
        Format(
            name="awq", title="AWQ GEMM", methods=("awq",), module="pipeline.formats.awq",
            markers=(".qweight",), components=(".qweight", ".qzeros", ".scales"), bits=(4,),
            layouts=("gemm", "exllama", "ipex"),  # the last two are kernels for what lies as GEMM
            otherwise="repack it with gptqmodel",
            dequantize="GEMM, any group size", train="adapters, heads; all after upcast",
            quantize="one calibration pass",
            reload="transformers + gptqmodel", libraries=("gptqmodel",),
        ),
        Format(
            name="awq-gemv", title="AWQ GEMV", methods=("awq",), module="pipeline.formats.awq_gemv",
            markers=(".qweight",), components=(".qweight", ".qzeros", ".scales"), bits=(4,), layouts=("gemv",),
            dequantize="4 bits, any group size", train="after upcast", quantize="no",
            reload="after upcast",
        ),
        Format(
            name="awq-gemv-fast", title="AWQ GEMV fast, llm-awq", methods=("awq",),
            module="pipeline.formats.awq_gemv_fast", markers=(".qweight",),
            components=(".qweight", ".qzeros", ".scaled_zeros", ".scales"), bits=(4,),
            layouts=("gemv_fast", "llm-awq"), dequantize="4 bits, any group size", train="after upcast",
            quantize="no", reload="after upcast",
        ),
        Format(
            name="auto-round", title="AutoRound", methods=("auto-round", "intel/auto-round"),
            module="pipeline.formats.auto_round", markers=(".qweight",),
            components=(".qweight", ".qzeros", ".scales", ".g_idx"), bits=(2, 3, 4, 8),
            dequantize="its GPTQ and AWQ layouts; other bits and group sizes for single modules",
            train="after upcast", quantize="no", reload="after upcast",
        ),
        Format(
            name="compressed-tensors", title="compressed-tensors", methods=("compressed-tensors",),
            module="pipeline.formats.compressed_tensors",
            layouts=(
                "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
                "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "mixed-precision", "dense",
                "fakequant",
            ),
            otherwise="load it with an older vllm or compressed-tensors (0.14.0 was the last to know sparse ones)",
            markers=(".weight_packed", ".weight_scale"),
            components=(
                ".weight", ".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx",
                ".weight_global_scale",
            ),
            leftovers=tuple(
                f".{what}_{part}"
                for what in ("input", "output", "q", "k", "v")
                for part in ("scale", "zero_point", "global_scale")
            ),
            dequantize="pack-, int-, float- and naive-quantized, NVFP4, MXFP4, MXFP6, MXFP8, several in one model",
            train="after upcast", quantize="w4a16, w8a8: one calibration pass; fp8: directly",
            reload="transformers + compressed-tensors; vLLM", libraries=("compressed_tensors",),
        ),
        Format(
            name="fp8", title="FP8", methods=("fp8", "fbgemm_fp8"), module="pipeline.formats.fp8",
            markers=(".weight_scale_inv", ".weight_scale", ".qscale_weight", ".scale", "_scale_inv", "_scale"),
            components=(
                ".weight", ".weight_scale_inv", ".weight_scale", ".qscale_weight", ".scale", "_scale_inv", "_scale", "",
            ),
            needs=(".weight", ""),
            leftovers=(
                "activation_scale", ".input_scale", ".input_scale_ub", ".output_scale", ".k_scale", ".v_scale",
                ".q_scale", ".prob_output_scale", ".qscale_act",
            ),
            dequantize="e4m3 and e5m2; scales in blocks, by output or one in all; fused experts; FP4 experts",
            train="adapters, heads; all after upcast", quantize="no", reload="transformers", activations="float8",
        ),
        Format(
            name="modelopt", title="ModelOpt FP8, NVFP4", methods=("modelopt",), module="pipeline.formats.modelopt",
            layouts=("fp8", "fp8_per_channel_per_token", "fp8_pb_wo", "nvfp4", "mixed_precision"),
            otherwise="run it with vllm or TensorRT-LLM",
            markers=(".weight_scale",), components=(".weight", ".weight_scale", ".weight_scale_2"),
            leftovers=(".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale"),
            dequantize="FP8 by tensor, output and block; NVFP4; both in one model", train="after upcast",
            quantize="no", reload="vllm",
        ),
        Format(
            name="mxfp4", title="MXFP4", methods=("mxfp4",), module="pipeline.formats.mxfp4",
            markers=("_blocks",), components=("_blocks", "_scales"), weight="",
            dequantize="gpt-oss experts", train="after upcast", quantize="no",
            reload="transformers + kernels",
        ),
        Format(
            name="hqq", title="HQQ", methods=("hqq",), module="pipeline.formats.hqq",
            markers=(".W_q",), components=(".W_q", *HQQ_PARTS),
            dequantize="8, 4, 3, 2, 1 bits, either axis, any group size", train="after upcast", quantize="no",
            reload="after upcast",
        ),
        Format(
            name="torchao", title="torchao", methods=("torchao",), module="pipeline.formats.torchao_",
            markers=("._weight_qdata",), components=("._weight_*",),
            dequantize="int8, intN kept as int8, float8; any block size", train="after upcast", quantize="no",
            reload="after upcast",
        ),
        # Its tensors have names of their own: `pipeline.gguf_names` says what becomes of each, no marker does.
        Format(
            name="gguf", title="GGUF", methods=("gguf",), module="pipeline.formats.gguf", markers=(), components=(),
            weight="",
            dequantize="every type of the gguf package, split files", train="after upcast",
            quantize="Q8_0, Q4_0, written directly",
            reload="transformers + gguf, llama.cpp", libraries=("gguf",),
        ),
    )
}  # fmt: skip

# What cannot be read here, and the tool that can.
READ_ELSEWHERE = {
    "quanto": "load it with transformers and optimum-quanto",
    "aqlm": "load it with transformers and aqlm",
    "vptq": "load it with transformers and vptq",
    "spqr": "load it with transformers and spqr_quant",
    "higgs": "load it with transformers and flute, then model.dequantize()",
    "eetq": "load it with transformers and kernels, on a CUDA device",
    "bitnet": "load it with transformers",
    "quip": "load it with the QuIP# repository's own code",
    "quark": "load it with transformers and amd-quark",
    "fp_quant": "load it with transformers and fp_quant",
    "metal": "load it with transformers on a Mac",
}


def format_of(quantization: Quantization | None) -> Format:
    """The row that reads a checkpoint; raise UnsupportedFormat, naming the tool that can, where none does."""
    if quantization is None:
        return DENSE
    bits, method = quantization.bits, quantization.method
    rows = [row for row in FORMATS.values() if method in row.methods]
    if not rows:
        readable = ", ".join(sorted({method for row in FORMATS.values() for method in row.methods}))
        elsewhere = READ_ELSEWHERE.get(method, "use the library that wrote it")
        raise UnsupportedFormat(f"quant_method {method} cannot be read (those that can: {readable}); {elsewhere}")
    layout = quantization.layout
    rows = [row for row in rows if layout in row.layouts or not row.layouts] or rows
    if rows[0].layouts and layout not in rows[0].layouts:
        known = ", ".join(name for row in FORMATS.values() if method in row.methods for name in row.layouts)
        raise UnsupportedFormat(f"{method} in layout {layout} cannot be read, only {known}; {rows[0].otherwise}")
    for row in rows:
        if bits in row.bits or not row.bits:
            return row
    valid = ", ".join(str(b) for row in rows for b in row.bits)
    raise UnsupportedFormat(f"{method} with bits {bits} cannot be read; valid bits are {valid}")


def format_to(target: Target) -> Format:
    """The row that a target is written in."""
    match target:
        case BitsAndBytesTarget():
            return FORMATS["bnb-4bit" if target.bits == 4 else "bnb-int8"]  # noqa: PLR2004 - four bits
        case GPTQTarget() | AWQTarget() | CompressedTensorsTarget() | GGUFTarget():
            return FORMATS[target.format]


def bits_per_weight(target: Target) -> float:
    """Bits on disk for each quantized weight, scales and zero points included."""
    match target:
        case BitsAndBytesTarget(bits=8):
            return 8.0
        case BitsAndBytesTarget():
            return 4.5 if target.double_quant is False else 4 + 8 / 64 + 32 / (64 * 256)
        case GGUFTarget():  # a float16 scale for each block of 32
            return {"q8_0": 8.5, "q4_0": 4.5}[target.type]
        case CompressedTensorsTarget():
            return target.bits if target.group_size == -1 else target.bits + 16 / target.group_size
        case GPTQTarget(bits_per_weight=float(budget)):
            return budget
        case GPTQTarget() | AWQTarget():
            bits = target.code_bits if isinstance(target, GPTQTarget) else target.bits
            return bits if target.group_size == -1 else bits + (16 + bits) / target.group_size
