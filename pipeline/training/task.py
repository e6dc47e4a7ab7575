"""What a model learns to do, by what its rows are: say the next token, name a class, give a number, tag tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from pipeline.checkpoint import Checkpoint, read_json
from pipeline.errors import CheckpointError, DataError
from pipeline.model_task import own_labels
from pipeline.sections import LABELLED, Kind, ProjectorTask

FILE = "task.json"
_CLASSES: Mapping[str, Any] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "tagged": AutoModelForTokenClassification,
}
# PEFT's names of the same: with the last two it trains the head whole, beside the adapter.
_PEFT = {"classification": "SEQ_CLS", "regression": "SEQ_CLS", "tagged": "TOKEN_CLS"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """`kind` is what the rows are; `classes` the names of their labels, in the order of the head's outputs.

    Batches are padded with `pad_token`. `architecture` is the class that was trained, where it is not the checkpoint's
    own; `dropped` are the modules of the checkpoint that it has no place for, such as lm_head in a classifier.
    """

    kind: Kind
    classes: tuple[str, ...] | None = None
    pad_token: int = 0
    architecture: str = ""
    dropped: tuple[str, ...] = ()

    @property
    def language(self) -> bool:
        """Whether the next token is what is learned."""
        return self.kind not in LABELLED

    @property
    def model_class(self) -> Any:
        """Transformers' class that has the head for it."""
        return _CLASSES.get(self.kind, AutoModelForCausalLM)

    @property
    def projected(self) -> ProjectorTask:
        """A projector's name for it."""
        assert self.kind in get_args(ProjectorTask), f"{self.kind}: the plan refuses it"
        return cast("ProjectorTask", self.kind)

    @property
    def peft_type(self) -> str:
        """PEFT's name for it."""
        return _PEFT.get(self.kind, "CAUSAL_LM")

    @property
    def config(self) -> dict[str, Any]:
        """What it adds to a model's config.json; for a language model nothing."""
        if self.language:
            return {}
        names = self.classes or ("value",)
        found: dict[str, Any] = {"architectures": [self.architecture]} if self.architecture else {}
        found |= {
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }
        if self.kind != "tagged":
            found["problem_type"] = "regression" if self.kind == "regression" else "single_label_classification"
        return found

    def describe(self, config: Any) -> None:
        """Have a config object say so too."""
        for name, value in self.config.items():
            setattr(config, name, {int(key): each for key, each in value.items()} if name == "id2label" else value)
        text = config.get_text_config()
        if text.pad_token_id is None:  # a decoder's classifier looks for the last token that is not this one
            text.pad_token_id = self.pad_token

    def write(self, folder: Path) -> None:
        """Say in `folder` what was learned, for whoever merges it; nothing for a language model."""
        if not self.language:
            (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Task:
        """What the trained weights in `folder` were taught; raise CheckpointError where that cannot be read."""
        if not (folder / FILE).exists():
            return Task(kind="text")
        try:
            found = read_json(folder / FILE)
            classes = tuple(found["classes"]) if found["classes"] else None
            return Task(
                kind=found["kind"], classes=classes, pad_token=int(found["pad_token"]),
                architecture=found["architecture"], dropped=tuple(found["dropped"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / FILE}: cannot be read ({error!r}); train again") from error


def write_config(base: Checkpoint, task: Task, folder: Path) -> None:
    """Write the base's config.json, with what the task adds to it."""
    padding = {} if task.language or base.config.get("pad_token_id") is not None else {"pad_token_id": task.pad_token}
    text = json.dumps({**base.config, **task.config, **padding}, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def known_classes(base: Checkpoint, kind: Kind, found: tuple[str, ...]) -> tuple[str, ...]:
    """The classes in the order that the base's trained head has them, or as `found` among the rows where it has none.

    Raise DataError where the rows hold a label that the head does not know.
    """
    known = own_labels(base.config, kind)
    if known is None:
        return found
    if strange := sorted(set(found) - set(known)):
        raise DataError(
            f"train.data: label {strange[0]} is none of the {len(known)} that {base.path} knows "
            f"({', '.join(known[:8])}); correct the rows, or start from a model without that head"
        )
    return known
