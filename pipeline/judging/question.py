"""What is asked of a model: rows of its kind, the tokenizer that encodes them, and what it is compared with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline.checkpoint import read_json
from pipeline.errors import DataError, NonFinite
from pipeline.evaluation.load import load_model
from pipeline.evaluation.tasks import Comparison
from pipeline.gates import Scores
from pipeline.model_class import class_of, lacks
from pipeline.pairing import is_projected
from pipeline.training import load_projected


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A comparison, its rows, all of the kind that the model answers, and the tokenizer of the model."""

    task: Comparison
    rows: list[Any]
    tokenizer: PreTrainedTokenizerBase

    def load(self, path: Path) -> Any:
        """The model of a folder, by the class that its config names, or with its projector."""
        trusted = self.task.trust_remote_code
        if is_projected(path):
            return load_projected(path, trust_remote_code=trusted)
        model_class = class_of(read_json(path / "config.json"), trust_remote_code=trusted)
        if reason := lacks(model_class):
            raise DataError(f"{path}: {model_class.__name__} {reason}, so it cannot be judged; leave out evaluate")
        return load_model(path, model_class=model_class, trust_remote_code=trusted)

    def check_reference(self, figure: float) -> None:
        """Raise NonFinite where the reference's own figure is none: nothing can be held against it."""
        if not math.isfinite(figure):
            raise NonFinite(
                f"{self.task.reference}: what it says of {self.task.data.path} is not finite; the reference itself is "
                "broken"
            )

    def scores(self, **figures: Any) -> Scores:
        """The figures, with the names of what they are of."""
        return Scores(variant=self.task.variant, reference=self.task.reference, **figures)
