"""What is imported once, before the first child is forked: a child then starts in a fifth of a second."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PRELOAD = ("torch", "transformers", "transformers.models.auto.modeling_auto", "transformers.quantizers.auto")
TRAINING = ("peft", "transformers.trainer")


def preload(model_type: str, *, training: bool = True) -> tuple[str, ...]:
    """The modules to import before the first child is forked, the architecture's own among them.

    Without `training` those that only training needs are left out, which take two seconds.
    """
    modules = (*PRELOAD, *TRAINING) if training else PRELOAD
    # find_spec of a submodule would import transformers here, so the file is looked for instead.
    spec = importlib.util.find_spec("transformers")
    name = f"transformers.models.{model_type}.modeling_{model_type}"
    if (
        spec
        and spec.origin
        and (Path(spec.origin).parent / "models" / model_type / f"modeling_{model_type}.py").exists()
    ):
        return (*modules, name)
    return modules
