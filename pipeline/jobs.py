"""What a stage is given, and what it gives back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.kept import Donor
from pipeline.sections import Data, Launcher


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a stage is given.

    `inputs` maps a role (`source`, `dense`, `base`, `adapter`, …) to a checkpoint folder, `data` a role to rows.
    `options` are the plain values that change the result. `workspace` is a folder of the stage's own that outlives a
    kill: a rerun of the same job finds there what the last one left. `cache` is where features of frozen backbones are
    kept for any later job, `logs` where TensorBoard reads; without them both go into the workspace. `launcher` says how
    many processes train together. `donors` maps a variant to the folders that its packed bytes may come from.
    """

    inputs: Mapping[str, Path]
    options: Mapping[str, Any]
    workspace: Path
    cache: Path | None = None
    logs: Path | None = None
    launcher: Launcher = field(default_factory=Launcher)
    data: Mapping[str, Data] = field(default_factory=dict)
    donors: Mapping[str, tuple[Donor, ...]] = field(default_factory=dict)
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A finished folder, ready to be committed as `variant`.

    `metrics` are figures for people, `notes` plain values for later stages (dropped tensors, layouts); neither enters
    the digest.
    """

    variant: str
    folder: Path
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


def fresh(folder: Path) -> Path:
    """The folder, empty: what a kill left half written is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
