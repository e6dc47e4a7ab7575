"""What an evaluating child process is asked, without torch, so that whoever asks need not import it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.sections import Data

# gptqmodel's loader asks its pool for a worker a core and refuses to start with fewer than two.
ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What to measure: `path` beside `reference` (or alone), on windows of `sequence_length` tokens of `data`."""

    variant: str
    path: Path
    reference: str | None
    reference_path: Path | None
    data: Data
    sequence_length: int
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """Text to go on from, by the model in a folder."""

    path: Path
    text: str
    max_new_tokens: int
    trust_remote_code: bool = False
