"""The recipe's sections: what each key is called, what it may hold, what it means."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from pipeline.section import Section

Dtype = Literal["bfloat16", "float16", "float32"]
Method = Literal["none", "full", "lora", "head", "projector", "qat"]
Base = Literal["dense", "source", "nf4", "int8"]
Engine = Literal["auto", "trainer", "features"]
Kind = Literal[
    "text", "messages", "prompt_completion", "alpaca", "classification", "regression", "tagged", "pairs"
]  # fmt: skip
ProjectorKind = Literal["linear", "mlp"]
Pooling = Literal["last_token", "mean", "cls"]
ProjectorTask = Literal["classification", "regression", "pairs"]
LABELLED: frozenset[str] = frozenset({"classification", "regression", "tagged", "pairs"})


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
    """Rows."""

    path: str
    """JSONL, CSV, Parquet or text file, a folder or glob of such, a hub dataset's id[:config][@revision], or a URL."""
    format: Literal["auto"] | Kind = "auto"
    """What a row is; `auto` reads it off the first row's fields."""
    field: str = "text"
    """The field that holds the text, where the format is `text`, `classification` or `regression`."""
    label: str = "label"
    """The field that holds the label, where the format is `classification` or `regression`."""
    split: str = "train"
    """The split of a hub dataset."""
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the rows, chosen by the hash of their content, that training never sees; `evaluate.data` may be them."""
    validation: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Share of the rows, likewise, that training is watched on and `merge_base: better` chooses with."""
    part: Literal["train", "validation", "held_out"] = "train"
    """Which of the three parts is read."""

    @model_validator(mode="before")
    @classmethod
    def _bare_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Say that a bare path will do: editors and Prefect check against this schema, not against the parser."""
        return {"anyOf": [handler(core), {"type": "string"}]}

    @property
    def identity(self) -> dict[str, Any]:
        """What of it changes the rows beyond the content of its files."""
        return self.model_dump(exclude={"path"}, exclude_defaults=True)


class Projector(Section):
    """A small trained layer on pooled features of the backbone."""

    kind: ProjectorKind = "linear"
    """`linear`: one matrix and a bias; `mlp`: two, with GELU between."""
    out_features: Annotated[int | None, Field(ge=1)] = None
    """Values that come out; left out: the number of labels, or for pairs the backbone's hidden size."""
    hidden_features: Annotated[int | None, Field(ge=1)] = None
    """Values between an mlp's two matrices; left out: the backbone's hidden size."""
    pooling: Pooling = "last_token"
    """The positions whose hidden states become the feature: the last real token, all real tokens, the first."""


class Launcher(Section):
    """Several processes, by `accelerate launch`."""

    processes: Annotated[int, Field(ge=1)] = 1
    """Processes on this machine; each takes `per_device_train_batch_size` rows at a time."""
    config: str | None = None
    """An accelerate config file, for DDP or FSDP on one machine."""

    @property
    def several(self) -> bool:
        """Whether training leaves its own process."""
        return self.processes > 1 or self.config is not None


class Train(Section):
    """What trains, on what, for how long."""

    method: Method = "none"
    """`lora`: an adapter, merged afterwards; `full`: every weight; `head`: the architecture's own classifier;
    `projector`: a layer on pooled features; `qat`: every weight on the first target's grid; `none`: requantize as it
    is."""
    base: Base = "dense"
    """What the training stands on: the upcast weights, the source as it is, or the upcast weights in NF4 or int8."""
    engine: Engine = "auto"
    """For head and projector. `features`: the frozen backbone runs once over the rows, whatever the epochs; `trainer`:
    transformers' Trainer runs it every time. `auto`: features, unless `trainable` or augmentation asks for Trainer."""
    data: Data | None = None
    """The training rows."""
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens in a training sequence; documents are split into such."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What becomes of other rows that are longer: none is ever cut."""
    packing: bool = False
    """Whether several conversations or prompts share a sequence, each blind to the others; documents always do."""
    trainable: tuple[str, ...] = ()
    """Names of weights that train, such as model.layers.3.*; instead of all (full), or beside the head or projector."""
    lora: dict[str, Any] = Field(default_factory=lambda: {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"})
    """PEFT's LoraConfig names, verbatim; use_dora and use_rslora are among them."""
    merge_base: Literal["dequantized", "original", "better"] = "dequantized"
    """For lora on nf4 or int8: merge into the dequantized base that it was trained on, into the weights from before
    that, or into whichever has the lower loss on the `validation` part of the training data."""
    projector: Projector = Projector()
    arguments: dict[str, Any] = Field(default_factory=dict)
    """transformers' TrainingArguments names, verbatim."""
    launcher: Launcher = Launcher()

    @model_validator(mode="after")
    def _data_given(self) -> Train:
        if self.method != "none" and self.data is None:
            raise ValueError(f"train.method is {self.method} but train.data is missing; name a file of training rows")
        return self

    @model_validator(mode="after")
    def _options_fit(self) -> Train:
        attached = self.method in {"head", "projector"}
        if self.trainable and self.method not in {"full", "head", "projector"}:
            raise ValueError(
                f"train.trainable does not go with method {self.method}; use it with full, head or projector"
            )
        if self.engine != "auto" and not attached and self.method != "none":
            raise ValueError(f"train.engine is for head and projector, the method is {self.method}; leave it out")
        if self.engine == "features" and (changing := self._changes_features):
            raise ValueError(
                f"train.engine features computes them once, but {changing} changes them as training goes on; leave it "
                "out or use engine trainer"
            )
        if self.merge_base != "dequantized" and self.method != "lora":
            raise ValueError(f"train.merge_base is for lora, the method is {self.method}; leave it out")
        if self.merge_base == "better" and self.data is not None and not self.data.validation:
            raise ValueError(
                "train.merge_base better chooses on training rows set aside; set train.data.validation to a share such "
                "as 0.1"
            )
        return self

    @property
    def _changes_features(self) -> str:
        """What changes the backbone's features from step to step, or nothing where they stay."""
        if self.trainable:
            return "train.trainable"
        return "neftune_noise_alpha" if self.arguments.get("neftune_noise_alpha") else ""

    @property
    def resolved_engine(self) -> Engine:
        """`engine`, chosen where it is auto: features are kept only where no epoch changes them."""
        if self.engine != "auto":
            return self.engine
        return "features" if self.method in {"head", "projector"} and not self._changes_features else "trainer"


Rows = Literal["train"] | Data


class Calibration(Section):
    """The rows whose activations steer GPTQ and AWQ."""

    data: Rows | Annotated[tuple[Rows, ...], Field(min_length=1)] = "train"
    """`train` for the training rows, a file, or a list of such that are mixed."""
    shares: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    """For a list: what each of its rows has of the samples, such as [3, 1]; left out: all alike."""
    samples: Annotated[int, Field(ge=1)] = 128
    """Sequences of tokens, of all rows together."""
    sequence_length: Annotated[int, Field(ge=16)] = 512
    """Tokens in a sample."""
    refresh: bool = False
    """Whether modules are rounded anew that an earlier artifact holds, made of the same weights with the same options;
    otherwise they are copied from it, whatever it was calibrated on."""

    @model_validator(mode="after")
    def _shares_fit(self) -> Calibration:
        count = len(self.sources)
        if self.shares and len(self.shares) != count:
            raise ValueError(f"shares has {len(self.shares)} for {count} sources of data; give each one")
        if 0 in self.counts:
            none = self.sources[self.counts.index(0)]
            raise ValueError(
                f"shares leaves {none if isinstance(none, str) else none.path} none of the {self.samples} samples; "
                "raise samples or its share"
            )
        return self

    @property
    def sources(self) -> tuple[Rows, ...]:
        """`data` as a list."""
        return self.data if isinstance(self.data, tuple) else (self.data,)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many of the samples each source gives: its share, what is left over to the largest remainders."""
        shares = self.shares or (1.0,) * len(self.sources)
        parts = [self.samples * share / sum(shares) for share in shares]
        counts = [int(part) for part in parts]
        nearest = sorted(range(len(parts)), key=lambda i: counts[i] - parts[i])
        for i in nearest[: self.samples - sum(counts)]:
            counts[i] += 1
        return tuple(counts)

    def rows(self, train: Data | None) -> dict[str, Data]:
        """The rows of each source, by the role that they have as a stage's data; `train` are the training rows."""
        found = [train if source == "train" else source for source in self.sources]
        roles = ["calibration"] if len(found) == 1 else [f"calibration_{i}" for i in range(1, len(found) + 1)]
        return {role: data for role, data in zip(roles, found, strict=True) if isinstance(data, Data)}

    @property
    def drawn(self) -> dict[str, Any]:
        """What is drawn from the rows, as the quantize stage takes it: `samples` is a list where they are mixed."""
        several = len(self.counts) > 1
        return {"samples": list(self.counts) if several else self.samples, "sequence_length": self.sequence_length}


class Bounds(Section):
    """Bounds on figures; a figure without a bound is shown and judged by nobody."""

    perplexity_increase: float | None = None
    """At most: perplexity / reference perplexity - 1. Negative asks for a gain."""
    kl_divergence: Annotated[float | None, Field(ge=0)] = None
    """At most: mean KL(reference || model) in nats per token, or per row of a classifier."""
    top1_agreement: Annotated[float | None, Field(ge=0, le=1)] = None
    """At least: the share of positions, or of rows, where both name the same token or label."""
    accuracy: Annotated[float | None, Field(ge=0, le=1)] = None
    """At least: the share of right labels; for pairs, of anchors whose positive is the nearest."""
    accuracy_drop: Annotated[float | None, Field(ge=-1, le=1)] = None
    """At most: the reference's accuracy - the model's. Negative asks for a gain."""
    f1: Annotated[float | None, Field(ge=0, le=1)] = None
    """At least: the mean over labels of F1."""
    error_increase: float | None = None
    """At most, for regression: root mean squared error / the reference's - 1."""


class Gates(Bounds):
    """Bounds of each variant against its dense parent."""

    tuned: Bounds = Bounds()
    """Bounds of the tuned model against the source."""


class Evaluate(Section):
    """What the models are judged on."""

    data: Literal["held_out"] | Data
    """The evaluation rows; `held_out` for that part of the training data."""
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
