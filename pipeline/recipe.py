"""The user's YAML as typed values; the only parser of user input.

The same models are the command line's recipe, the Prefect flow's parameter form and the JSON Schema for editors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import yaml
from pydantic import Field, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from pipeline.errors import RecipeError
from pipeline.targets import Section, Target, first_sentence

Dtype = Literal["bfloat16", "float16", "float32"]


class Upcast(Section):
    """How the source becomes dense."""

    dtype: Dtype = "bfloat16"
    """Data type of the dense weights."""
    max_shard_size: Annotated[str, Field(pattern=r"^[1-9]\d{0,5}(\.\d+)? ?[MG]B$")] = "5GB"
    """Most bytes of a weight file, such as 500MB or 5GB; a tensor larger than that has a file of its own."""

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes; MB and GB are powers of ten, as on the hub."""
        number, unit = self.max_shard_size[:-2], self.max_shard_size[-2:]
        return int(float(number) * {"MB": 10**6, "GB": 10**9}[unit])


class Data(Section):
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

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Say that a bare path will do: editors and Prefect check against this schema, not against the parser."""
        return {"anyOf": [handler(core), {"type": "string"}]}


class Train(Section):
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


class Calibration(Section):
    """The rows whose activations steer GPTQ and AWQ."""

    data: Literal["train"] | Data = "train"
    """`train` for the training rows, or a file."""
    samples: Annotated[int, Field(ge=1)] = 128
    """Sequences of tokens."""
    sequence_length: Annotated[int, Field(ge=16)] = 512
    """Tokens in a sample."""


class Bounds(Section):
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


class Evaluate(Section):
    """What the models are judged on."""

    data: Data
    """The evaluation rows."""
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens in a window; windows do not overlap."""
    gates: Gates = Gates()
    """Bounds that a variant must keep to be promoted."""


class Promote(Section):
    """What a passing variant gets."""

    alias: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")] = "production"
    """The alias that moves to its version."""

    @model_validator(mode="after")
    def _no_version(self) -> Promote:
        if re.fullmatch(r"v\d+", self.alias):
            raise ValueError(f"alias {self.alias} would look like a version; choose a word")
        return self


class Recipe(Section):
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
    """The formats to quantize to; each becomes a variant."""
    calibration: Calibration = Calibration()
    evaluate: Evaluate | None = None
    """Left out: nothing is measured."""
    promote: Promote | None = None
    """Left out: no alias moves."""
    store: str = "artifacts"
    """Folder of the artifact store."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """What every random choice starts from."""

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
