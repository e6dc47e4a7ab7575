"""Where a checkpoint comes from: a folder, a GGUF file, or the hub."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint import Checkpoint
from pipeline.companions import COMPANIONS
from pipeline.errors import CheckpointError
from pipeline.gguf_files import SUFFIX, is_gguf

HUB_PATTERNS = [*COMPANIONS, "*.safetensors"]


def open_source(source: str) -> Checkpoint:
    """Open a folder, a GGUF file or a hub id[@revision]; a hub id is taken from the local cache or fetched."""
    path = Path(source)
    if path.is_dir() or is_gguf(path):
        return Checkpoint.open(path)
    repository, _, revision = source.partition("@")
    if source.startswith((".", "/", "~")) or repository.count("/") != 1 or source.endswith(SUFFIX):
        raise CheckpointError(
            f"{source}: no such folder; name a folder, a hub id such as org/model, a {SUFFIX} file, or a store "
            "reference"
        )
    return Checkpoint.open(_snapshot(repository, revision or None))


def _snapshot(repository: str, revision: str | None) -> Path:
    """The hub's local snapshot of a repository, fetched unless the cache holds it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_PATTERNS))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        where = f"{repository}@{revision}" if revision else repository
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{where}: no such folder, and the hub did not give it ({reason}); check the name, the network and HF_TOKEN"
        ) from error
