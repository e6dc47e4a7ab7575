"""The table of formats, without torch: what each is called, what it is made of, what can be done with it.

A new format is one row here, one file in `pipeline/formats/`, and one test file.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.checkpoint import Quantization
from pipeline.errors import MissingLibrary, UnsupportedFormat
from pipeline.targets import AWQTarget, BitsAndBytesTarget, GPTQTarget, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A way for weights to lie on disk.

    A module is packed when the tensor `<module><marker>` exists for one of the markers; its packed tensors are
    `<module><component>`, and together they become the dense tensor `<module><weight>`. A component that ends in `*`
    stands for every name that begins so. `leftovers` end the names of what quantized activations need and a dense model
    has no place for. `methods` are the `quant_method`s that the row reads, with these `bits` (none: any) and in these
    `layouts` (none: any).
    """

    name: str
    title: str
    methods: tuple[str, ...]
    module: str
    markers: tuple[str, ...]
    components: tuple[str, ...]
    bits: tuple[int, ...] = ()
    layouts: tuple[str, ...] = ()
    weight: str = ".weight"
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
        modules: dict[str, list[str]] = {
            name.removesuffix(marker): [] for name in names for marker in self.markers if name.endswith(marker)
        }
        for name in names if modules else ():
            for component in self.components:
                stem = component.rstrip("*")
                cut = name.rfind(stem) if stem != component else len(name) - len(stem) if name.endswith(stem) else -1
                if cut >= 0 and name[:cut] in modules:
                    modules[name[:cut]].append(name[cut:])
                    break
        return {module: tuple(sorted(found)) for module, found in sorted(modules.items())}


DENSE = Format(
    name="dense", title="bf16, fp16, fp32", methods=(), module="pipeline.formats.dense", markers=(), components=(),
    bits=(16, 32), dequantize="copied or cast", train="full, LoRA", quantize="the upcast stage", reload="transformers",
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
            dequantize="NF4, FP4, with and without double quantization", train="after upcast",
            quantize="transformers + bitsandbytes",
            reload="transformers + bitsandbytes", libraries=("bitsandbytes",),
        ),
        Format(
            name="bnb-int8", title="bitsandbytes int8", methods=("bitsandbytes",), module="pipeline.formats.bnb_int8",
            markers=(".SCB",), components=(".weight", ".SCB", ".weight_format"), bits=(8,),
            dequantize="row-major", train="after upcast", quantize="transformers + bitsandbytes",
            reload="transformers + bitsandbytes", libraries=("bitsandbytes",),
        ),
        Format(
            name="gptq", title="GPTQ", methods=("gptq",), module="pipeline.formats.gptq",
            markers=(".qweight",), components=(".qweight", ".qzeros", ".scales", ".g_idx"), bits=(2, 3, 4, 8),
            dequantize="v1 and v2, any group size, desc_act, symmetric or not", train="after upcast",
            quantize="gptqmodel",
            reload="transformers + optimum + gptqmodel", libraries=("gptqmodel", "optimum"),
        ),
        Format(
            name="awq", title="AWQ GEMM", methods=("awq",), module="pipeline.formats.awq",
            markers=(".qweight",), components=(".qweight", ".qzeros", ".scales"), bits=(4,),
            layouts=("gemm", "exllama", "ipex"),  # the last two are kernels for what lies as GEMM
            dequantize="GEMM, any group size", train="after upcast", quantize="gptqmodel",
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
    )
}  # fmt: skip

# What cannot be read here, and the tool that can.
READ_ELSEWHERE = {
    "compressed-tensors": "load it with transformers, which dequantizes it while loading",
    "fp8": "load it with transformers and FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "load it with transformers and Mxfp4Config(dequantize=True)",
    "gguf": "load it with transformers and gguf_file=",
    "quanto": "load it with transformers and optimum-quanto",
    "aqlm": "load it with transformers and aqlm",
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
        raise UnsupportedFormat(f"{method} in layout {layout} cannot be read, only {known}; repack it with gptqmodel")
    for row in rows:
        if bits in row.bits or not row.bits:
            return row
    valid = ", ".join(str(b) for row in rows for b in row.bits)
    raise UnsupportedFormat(f"{method} with bits {bits} cannot be read; valid bits are {valid}")


def format_to(target: Target) -> Format:
    """The row that a target is written in."""
    match target:
        case BitsAndBytesTarget():
            return FORMATS["bnb-4bit" if target.bits == 4 else "bnb-int8"]  # noqa: PLR2004
        case GPTQTarget() | AWQTarget():
            return FORMATS[target.format]


def bits_per_weight(target: Target) -> float:
    """Bits on disk for each quantized weight, scales and zero points included."""
    match target:
        case BitsAndBytesTarget(bits=8):
            return 8.0
        case BitsAndBytesTarget():
            return 4.5 if target.double_quant is False else 4 + 8 / 64 + 32 / (64 * 256)
        case GPTQTarget() | AWQTarget():
            return target.bits if target.group_size == -1 else target.bits + (16 + target.bits) / target.group_size


def require_libraries(row: Format) -> None:
    """Raise MissingLibrary, with the command that installs it, where a format's library is absent."""
    for library in row.libraries:
        if importlib.util.find_spec(library) is None:
            extra = "bitsandbytes" if library == "bitsandbytes" else "gptqmodel"
            raise MissingLibrary(
                f"{row.title} needs {library}, which is not installed; run pip install 'requant[{extra}]'"
            )
