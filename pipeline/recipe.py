"""The user's YAML as typed values; the only parser of user input.

The same models are the command line's recipe, the Prefect flow's parameter form and the JSON Schema for editors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import RecipeError

Dtype = Literal["bfloat16", "float16", "float32"]


class _Section(BaseModel):
    """A frozen part of the recipe that names the nearest valid key when it meets an unknown one."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        valid = {field.alias or name for name, field in cls.model_fields.items()}
        for key in value:
            if key not in valid and key not in cls.model_fields:
                raise ValueError(unknown_key(str(key), valid))
        return value


class Upcast(_Section):
    """How the source becomes dense."""

    dtype: Dtype = "bfloat16"
    """Data type of the dense weights."""


class Data(_Section):
    """A file of rows."""

    path: str
    """JSONL, CSV, Parquet or plain text file."""
    format: Literal["auto", "text", "messages", "prompt_completion"] = "auto"
    """What a row is; `auto` reads it off the first row's fields."""
    field: str = "text"
    """The field that holds the text, where the format is `text`."""

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class Train(_Section):
    """What trains, on what, for how long."""

    method: Literal["none", "full", "lora"] = "none"
    """`lora`: an adapter, merged afterwards; `full`: every weight; `none`: requantize as it is."""
    base: Literal["dense"] = "dense"
    """What the training stands on: the upcast weights."""
    data: Data | None = None
    """The training rows."""
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens in a training sequence; longer rows are split (text) or refused (messages, prompts)."""
    lora: dict[str, Any] = Field(default_factory=lambda: {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
    """PEFT's LoraConfig names, verbatim."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """transformers' TrainingArguments names, verbatim."""

    @model_validator(mode="after")
    def _data_given(self) -> Train:
        if self.method != "none" and self.data is None:
            raise ValueError(f"train.method is {self.method} but train.data is missing; name a file of training rows")
        return self


class _Target(_Section):
    name: Annotated[str | None, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")] = None
    """The variant's name in the store; made from the format and bits where it is left out."""

    @property
    def variant(self) -> str:
        """The variant's name in the store."""
        return self.name or self._default_name()

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
        if self.bits == 8 and (self.type is not None or self.double_quant is not None):  # noqa: PLR2004
            raise ValueError("bitsandbytes with bits: 8 has neither type nor double_quant; leave both out")
        return self

    def _default_name(self) -> str:
        return "int8" if self.bits == 8 else (self.type or "nf4")  # noqa: PLR2004


class GPTQTarget(_Target):
    """GPTQ, on disk in the v1 `gptq` layout."""

    format: Literal["gptq"]
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024] = 128
    """Weights that share a scale; -1 is a whole input row."""
    symmetric: bool = True
    desc_act: bool = False
    """Whether columns are rounded in the order of their activations' size."""

    def _default_name(self) -> str:
        return f"gptq-{self.bits}bit"


class AWQTarget(_Target):
    """AWQ, on disk in the GEMM layout."""

    format: Literal["awq"]
    bits: Literal[4] = 4
    group_size: Literal[16, 32, 64, 128] = 128
    """Weights that share a scale and a zero point."""

    def _default_name(self) -> str:
        return f"awq-{self.bits}bit"


Target = Annotated[BitsAndBytesTarget | GPTQTarget | AWQTarget, Field(discriminator="format")]


class Calibration(_Section):
    """The rows whose activations steer GPTQ and AWQ."""

    data: Literal["train"] | Data = "train"
    """`train` for the training rows, or a file."""
    samples: Annotated[int, Field(ge=1)] = 128
    sequence_length: Annotated[int, Field(ge=16)] = 512
    """Tokens in a sample."""


class Bounds(_Section):
    """Bounds on figures; a figure without a bound is shown and judged by nobody."""

    perplexity_increase: float | None = None
    """At most: perplexity / reference perplexity - 1. Negative asks for a gain."""
    kl_divergence: Annotated[float | None, Field(ge=0)] = None
    """At most: mean KL(reference || model) in nats per token."""
    top1_agreement: Annotated[float | None, Field(ge=0, le=1)] = None
    """At least: the share of positions where both name the same next token."""


class Gates(Bounds):
    """Bounds of each variant against its dense parent."""

    tuned: Bounds = Bounds()
    """Bounds of the tuned model against the source."""


class Evaluate(_Section):
    """What the models are judged on."""

    data: Data
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens in a window; windows do not overlap."""
    gates: Gates = Gates()


class Promote(_Section):
    """What a passing variant gets."""

    alias: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")] = "production"

    @model_validator(mode="after")
    def _no_version(self) -> Promote:
        if re.fullmatch(r"v\d+", self.alias):
            raise ValueError(f"alias {self.alias} would look like a version; choose a word")
        return self


class Recipe(_Section):
    """One job from source to promoted variants."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    """The model's name in the store."""
    source: str
    """Folder, hub id[@revision], or a store reference name/variant@version."""
    trust_remote_code: bool = False
    """Whether Python files of the source may run."""
    upcast: Upcast = Upcast()
    train: Train = Train()
    quantize: tuple[Target, ...] = ()
    calibration: Calibration = Calibration()
    evaluate: Evaluate | None = None
    promote: Promote | None = None
    store: str = "artifacts"
    """Folder of the artifact store."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    CALIBRATED: ClassVar[frozenset[str]] = frozenset({"gptq", "awq"})

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        variants = [target.variant for target in self.quantize]
        for variant in variants:
            if variants.count(variant) > 1:
                raise ValueError(f"two targets would be called {variant}; give one of them a name")
            if variant in RESERVED_VARIANTS:
                raise ValueError(f"a target cannot be called {variant}, which names a stage's output; choose another")
        if self.promote and not self.evaluate:
            raise ValueError("promote needs evaluate: what nobody measured is not promoted; add evaluate.data")
        if self.calibrated and self.calibration.data == "train" and self.train.data is None:
            raise ValueError("calibration.data is train, but train.data is missing; name a calibration file")
        return self

    @property
    def calibrated(self) -> bool:
        """Whether a target needs calibration rows."""
        return any(target.format in self.CALIBRATED for target in self.quantize)

    @property
    def calibration_data(self) -> Data:
        """The rows that calibration reads."""
        data = self.train.data if self.calibration.data == "train" else self.calibration.data
        assert data is not None
        return data


RESERVED_VARIANTS = frozenset({"dense", "adapter", "tuned", "evaluation"})


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, with `key.path=value` overrides applied; raise RecipeError in one sentence."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"recipe {path}: {error.strerror}; name a readable YAML file") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path}: not UTF-8 text; name a YAML file") from error
    return parse_recipe(text, where=str(path), overrides=overrides)


def parse_recipe(text: str, *, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Parse YAML `text`; `where` names it in errors."""
    try:
        # _Yaml is a SafeLoader: it builds plain values only.
        tree = yaml.load(text, Loader=_Yaml)  # noqa: S506
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {where}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {where}: found {type(tree).__name__}, expected keys such as name and source")
    for override in overrides:
        _override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(f"recipe {where}: {first_sentence(error)}") from error


def unknown_key(key: str, valid: Sequence[str] | set[str] | frozenset[str]) -> str:
    """Say that `key` is unknown, with the nearest valid key where one is near."""
    near = difflib.get_close_matches(key, sorted(valid), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"valid keys are {', '.join(sorted(valid))}"
    return f"unknown key {key}; {hint}"


def first_sentence(error: ValidationError) -> str:
    """The first of pydantic's findings as `place: what was found`."""
    first = error.errors(include_url=False)[0]
    tags = {"bitsandbytes", "gptq", "awq", "Data", "literal['train']"}
    place = ".".join(str(part) for part in first["loc"] if str(part) not in tags)
    said = first["msg"].removeprefix("Value error, ")
    found = first.get("input")
    shown = f" (found {found!r})" if isinstance(found, (str, int, float, bool)) else ""
    return f"{place}: {said}{shown}" if place else f"{said}{shown}"


def _override(tree: dict[str, Any], override: str) -> None:
    path, equals, raw = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: expected key=value, such as train.arguments.learning_rate=1e-4")
    value = yaml.load(raw, Loader=_Yaml)  # noqa: S506
    node: Any = tree
    *parents, last = path.split(".")
    for part in parents:
        node = _child(node, part, override)
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise RecipeError(f"--set {override}: {last} is not an index of a list of {len(node)}")
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise RecipeError(f"--set {override}: {'.'.join(parents)} is a value, not a section")


def _child(node: Any, part: str, override: str) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            raise RecipeError(f"--set {override}: {part} is not an index of a list of {len(node)}")
        return node[int(part)]
    if not isinstance(node, dict):
        raise RecipeError(f"--set {override}: {part} stands under a value, not a section")
    if not isinstance(node.get(part), (dict, list)):
        node[part] = {}
    return cast("dict[str, Any]", node)[part]


class _Yaml(yaml.SafeLoader):
    """YAML with 1.2's floats: PyYAML reads 2e-4 as a string."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
