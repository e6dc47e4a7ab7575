"""What a model can be quantized to: the options of each format, as a recipe or `--to` names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from pipeline.errors import RecipeError
from pipeline.section import Section, first_sentence

Grid = Literal["fresh", "keep", "better"]
AUTO_BITS = (3, 4, 8)  # what `bits: auto` chooses among, module by module


class _Target(Section):
    name: Annotated[str | None, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")] = None
    """The variant's name in the store; made from the format and bits where it is left out."""

    @property
    def variant(self) -> str:
        """The variant's name in the store."""
        return self.name or self._default_name()

    @property
    def calibrated(self) -> bool:
        """Whether its codes depend on the activations of calibration rows."""
        return False

    def _default_name(self) -> str:
        raise NotImplementedError


class BitsAndBytesTarget(_Target):
    """bitsandbytes NF4, FP4 or int8."""

    format: Literal["bitsandbytes"]
    bits: Literal[4, 8] = 4
    type: Literal["nf4", "fp4"] | None = None
    """The 4-bit data type; `nf4` where it is left out. int8 has none."""
    double_quant: bool | None = None
    """Whether the absmax are quantized too; true for 4 bits where it is left out. int8 has none."""

    @model_validator(mode="after")
    def _int8_has_no_type(self) -> BitsAndBytesTarget:
        if self.bits == 8 and (self.type is not None or self.double_quant is not None):  # noqa: PLR2004 - eight bits
            raise ValueError("bitsandbytes with bits: 8 has neither type nor double_quant; leave both out")
        return self

    def _default_name(self) -> str:
        return "int8" if self.bits == 8 else (self.type or "nf4")  # noqa: PLR2004 - eight bits


class GPTQTarget(_Target):
    """GPTQ, on disk in the v1 `gptq` layout."""

    format: Literal["gptq"]
    bits: Literal[2, 3, 4, 8, "auto"] = 4
    """`auto` gives each module 3, 4 or 8, so that the whole loses least within `bits_per_weight`. gptqmodel's own
    loader reads such a folder, transformers' does not."""
    # Left out of fingerprints where it is not given: what was made before there was such an option stays known.
    bits_per_weight: Annotated[float | None, Field(gt=0, exclude_if=lambda given: given is None)] = None
    """The budget of `bits: auto`: bits on disk for each weight of the packed modules, scales, zero points and group
    indices included."""
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = 128
    """Weights that share a scale; -1 is a whole input row."""
    symmetric: bool = True
    """Whether the zero point is the middle code."""
    desc_act: bool = False
    """Whether columns are rounded in the order of their activations' size."""
    static_groups: bool = False
    """Whether desc_act leaves the groups where they lie in memory, fixed before the first column is rounded."""
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the Gram matrix's mean diagonal that is added to it; raised by itself where that is too little."""
    mse: bool = False
    """Whether each scale is searched for the least squared error, instead of taken from the extremes."""
    rounding: Literal["gptq", "nearest"] = "gptq"
    """`nearest` rounds each weight by itself: no calibration, the floor to compare with."""
    sequential: bool = False
    """Whether a layer is calibrated on what the quantized layers before it give: one pass more."""
    grid: Grid = "fresh"
    """Where the source was packed on such a grid: `keep` rounds a changed module on its stored scales and zero points,
    `better` takes whichever of both has the smaller error of the layer's output."""
    engine: Literal["requant", "gptqmodel"] = "requant"
    """Who rounds; gptqmodel knows neither static_groups, mse, rounding, sequential nor grid."""

    @property
    def calibrated(self) -> bool:
        """Whether its codes depend on the activations of calibration rows."""
        return self.rounding == "gptq"

    @property
    def code_bits(self) -> int:
        """The bits of every code; of a target whose modules have different ones, `at` gives one that has some."""
        assert self.bits != "auto"
        return self.bits

    @property
    def candidates(self) -> tuple[int, ...]:
        """The bits that a module may get."""
        return AUTO_BITS if self.bits == "auto" else (self.bits,)

    def at(self, bits: int) -> GPTQTarget:
        """The same with `bits` for every module."""
        return self.model_copy(update={"bits": bits, "bits_per_weight": None})

    @model_validator(mode="after")
    def _budget_of_auto(self) -> GPTQTarget:
        if (self.bits == "auto") != (self.bits_per_weight is not None):
            raise ValueError("bits auto and bits_per_weight, its budget, go together; give both, or bits as a number")
        others = {"engine": "requant", "rounding": "gptq", "sequential": False, "grid": "fresh"}
        if self.bits == "auto" and (foreign := [key for key, plain in others.items() if getattr(self, key) != plain]):
            raise ValueError(f"bits auto has no {foreign[0]}; leave it out, or give bits as a number")
        return self

    @model_validator(mode="after")
    def _options_of_the_engine(self) -> GPTQTarget:
        own = [name for name in ("static_groups", "mse", "sequential") if getattr(self, name)]
        own += ["rounding"] if self.rounding != "gptq" else []
        own += ["grid"] if self.grid != "fresh" else []
        if self.engine == "gptqmodel" and own:
            raise ValueError(f"engine gptqmodel has no {own[0]}; leave it out, or use engine requant")
        if self.rounding == "nearest" and (
            useless := [name for name in ("desc_act", "sequential") if getattr(self, name)]
        ):
            raise ValueError(f"rounding nearest has no {useless[0]}; leave it out")
        if self.static_groups and not self.desc_act:
            raise ValueError("static_groups is about desc_act; set that too, or leave both out")
        return self

    def _default_name(self) -> str:
        if self.bits == "auto":
            return "gptq-auto"
        return f"{'rtn' if self.rounding == 'nearest' else 'gptq'}-{self.bits}bit"


class AWQTarget(_Target):
    """AWQ, on disk in the GEMM layout."""

    format: Literal["awq"]
    bits: Literal[4] = 4
    group_size: Literal[16, 32, 64, 128] = 128
    """Weights that share a scale and a zero point."""
    rounding: Literal["gptq", "nearest"] = "gptq"
    """`nearest` rounds each weight by itself on AWQ's grid, as its paper does; `gptq` has the inputs that are rounded
    later make good what the earlier ones lost."""
    clip: bool | None = None
    """Whether each group's range is searched for the least error; left out: with rounding nearest, which it helps."""
    grid: Grid = "fresh"
    """Where the source was packed on such a grid: `keep` rounds a changed module on its stored scales and zero points,
    `better` takes whichever of both has the smaller error of the layer's output."""
    engine: Literal["requant", "gptqmodel", "autoawq"] = "requant"
    """Who searches and rounds; the other two always clip, round to nearest and know no grid."""

    @property
    def calibrated(self) -> bool:
        """Whether its codes depend on the activations of calibration rows."""
        return True

    @model_validator(mode="after")
    def _options_of_the_engine(self) -> AWQTarget:
        own = ["clip: false"] if self.clip is False else []
        own += ["rounding"] if self.rounding != "gptq" else []
        own += ["grid"] if self.grid != "fresh" else []
        if self.engine != "requant" and own:
            raise ValueError(f"engine {self.engine} has no {own[0]}; leave it out, or use engine requant")
        return self

    def _default_name(self) -> str:
        return f"awq-{self.bits}bit"


class CompressedTensorsTarget(_Target):
    """compressed-tensors as vLLM runs it, symmetric."""

    format: Literal["compressed-tensors"]
    scheme: Literal["w4a16", "w8a8", "fp8"] = "w4a16"
    """`w4a16`: int4 weights in groups; `w8a8`: int8 weights, `fp8`: float8_e4m3fn ones, a scale for each output, and
    each token's inputs rounded alike while the model runs. fp8 is not calibrated and has none of the options below."""
    group_size: Literal[-1, 32, 64, 128] = 128
    """Weights of w4a16 that share a scale; -1 is a whole input row, as w8a8 and fp8 always have it."""
    damping: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of the Gram matrix's mean diagonal that is added to it; raised by itself where that is too little."""
    mse: bool = False
    """Whether each scale is searched for the least squared error, instead of taken from the extremes."""
    rounding: Literal["gptq", "nearest"] = "gptq"
    """`nearest` rounds each weight by itself: no calibration, the floor to compare with."""
    sequential: bool = False
    """Whether a layer is calibrated on what the quantized layers before it give: one pass more."""
    grid: Grid = "fresh"
    """Where the source was packed on such a grid: `keep` rounds a changed module on its stored scales, `better` takes
    whichever of both has the smaller error of the layer's output."""

    @property
    def bits(self) -> Literal[4, 8]:
        """Bits of a code."""
        return 4 if self.scheme == "w4a16" else 8

    @property
    def calibrated(self) -> bool:
        """Whether its codes depend on the activations of calibration rows."""
        return self.scheme != "fp8" and self.rounding == "gptq"

    @model_validator(mode="before")
    @classmethod
    def _one_scale_for_an_output(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("scheme", "w4a16") != "w4a16":
            return {"group_size": -1, **value}
        return value

    @model_validator(mode="after")
    def _options_of_the_scheme(self) -> CompressedTensorsTarget:
        if self.scheme != "w4a16" and self.group_size != -1:
            raise ValueError(f"scheme {self.scheme} has one scale for each output; leave group_size out")
        chosen = [
            name for name in ("damping", "mse", "rounding", "sequential", "grid")
            if getattr(self, name) != type(self).model_fields[name].default
        ]  # fmt: skip
        if self.scheme == "fp8" and chosen:
            raise ValueError(f"scheme fp8 has no {chosen[0]}; leave it out")
        if self.rounding == "nearest" and self.sequential:
            raise ValueError("rounding nearest has no sequential; leave it out")
        return self

    def _default_name(self) -> str:
        return f"{'rtn-' if self.rounding == 'nearest' else ''}{self.scheme}"


class GGUFTarget(_Target):
    """GGUF, one file for llama.cpp, each weight rounded by itself in blocks of 32 that share a scale."""

    format: Literal["gguf"]
    type: Literal["q8_0", "q4_0"] = "q8_0"
    """The ggml type of the matrices; with `q4_0` the output head is Q8_0. What has one dimension stays F32."""

    def _default_name(self) -> str:
        return f"gguf-{self.type}"


Target = Annotated[
    BitsAndBytesTarget | GPTQTarget | AWQTarget | CompressedTensorsTarget | GGUFTarget, Field(discriminator="format")
]

# What `train.base` makes of the dense weights before training stands on them.
BASE_TARGETS: Mapping[str, BitsAndBytesTarget] = {
    "nf4": BitsAndBytesTarget(format="bitsandbytes", type="nf4", name="base-nf4"),
    "int8": BitsAndBytesTarget(format="bitsandbytes", bits=8, name="base-int8"),
}


def is_mixed(target: Target) -> TypeGuard[GPTQTarget]:
    """Whether its modules have different bits, within a budget."""
    return isinstance(target, GPTQTarget) and target.bits == "auto"


def is_own(target: Target) -> bool:
    """Whether Requant's own engine makes it, in one pass with all others of its kind."""
    return isinstance(target, CompressedTensorsTarget) or (
        isinstance(target, GPTQTarget | AWQTarget) and target.engine == "requant"
    )


def is_sequential(target: Target) -> bool:
    """Whether it is calibrated on its own quantized layers."""
    return isinstance(target, GPTQTarget | CompressedTensorsTarget) and target.sequential


def grid_of(target: Target) -> Grid:
    """Whether its codes stay on the source's grid; bitsandbytes' and GGUF's have none."""
    return "fresh" if isinstance(target, BitsAndBytesTarget | GGUFTarget) else target.grid


_ADAPTER: TypeAdapter[Target] = TypeAdapter(Target)
SHORT: dict[str, dict[str, Any]] = {
    "nf4": {"format": "bitsandbytes", "type": "nf4"},
    "fp4": {"format": "bitsandbytes", "type": "fp4"},
    "int8": {"format": "bitsandbytes", "bits": 8},
}


def parse_target(text: str) -> Target:
    """The target in `format:key=value,…`, or in a short name such as nf4; raise RecipeError in one sentence."""
    name, _, rest = text.partition(":")
    options: dict[str, Any] = dict(SHORT.get(name, {"format": name}))
    for pair in filter(None, rest.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"--to {text}: {pair} is no key=value; write gptq:bits=4,group_size=128")
        options[key.strip()] = (
            int(value) if value.lstrip("-").isdigit() else {"true": True, "false": False}.get(value, value)
        )
    try:
        return _ADAPTER.validate_python(options)
    except ValidationError as error:
        raise RecipeError(f"--to {text}: {first_sentence(error)}") from error
