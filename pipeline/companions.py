"""The files of a model folder that travel along with its weights."""

from __future__ import annotations

from pathlib import Path

# A projector fits the weights that it was trained on, and no others.
PROJECTOR = frozenset({"projector.json", "projector.safetensors"})
# Copied unchanged, beside the weights: configs, tokenizer, chat template, licence, a projector that was trained on the
# weights, and the code of models that bring their own (copied; it runs only where the recipe trusts it).
COMPANIONS = (
    "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "chat_templates/*.jinja",
    "projector.safetensors",
)  # fmt: skip
# Written anew by whoever writes weights, or of no meaning to the copy.
NOT_COMPANIONS = frozenset({"config.json", "quantize_config.json", "quant_config.json", "artifact.json"})


def companions_in(folder: Path, *, but: frozenset[str]) -> tuple[str, ...]:
    """The names of a folder's companions, sorted, without those in `but`."""
    names = {path.relative_to(folder).as_posix() for pattern in COMPANIONS for path in folder.glob(pattern)}
    return tuple(sorted(name for name in names - NOT_COMPANIONS - but if (folder / name).is_file()))
