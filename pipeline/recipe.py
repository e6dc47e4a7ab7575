"""The user's YAML as typed values; the only parser of user input.

The same models are the command line's recipe, the Prefect flow's parameter form and the JSON Schema for editors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import Field, ValidationError, model_validator

from pipeline.errors import RecipeError
from pipeline.section import Section, first_sentence
from pipeline.sections import Calibration, Data, Evaluate, Promote, Train, Upcast
from pipeline.targets import Target


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
        if self.calibrated and "train" in self.calibration.sources and self.train.data is None:
            raise ValueError("calibration.data is train, but train.data is missing; name a calibration file")
        if (
            self.evaluate
            and self.evaluate.data == "held_out"
            and not (self.train.data is not None and self.train.data.held_out)
        ):
            raise ValueError("evaluate.data is held_out, but no row is; set train.data.held_out to a share such as 0.1")
        return self

    @property
    def calibrated(self) -> bool:
        """Whether a target needs calibration rows."""
        return any(target.calibrated for target in self.quantize)

    @property
    def calibration_rows(self) -> dict[str, Data]:
        """The rows that calibration reads, by role; none where no target needs any."""
        return self.calibration.rows(self.train.data) if self.calibrated else {}

    @property
    def evaluation_data(self) -> Data | None:
        """The rows that models are judged on, where the recipe has any."""
        if self.evaluate is None:
            return None
        if self.evaluate.data == "held_out":
            assert self.train.data is not None
            return self.train.data.model_copy(update={"part": "held_out"})
        return self.evaluate.data


RESERVED_VARIANTS = frozenset(
    {"dense", "adapter", "head", "projector", "tuned", "evaluation", "base-nf4", "base-int8", "dequantized"}
)


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
