"""A projector and the backbone that it was trained on, in one folder, each checked against the other's digest.

The folder is the backbone's, as transformers loads it, with two files beside: `projector.safetensors` (float32) and
`projector.json`, which says what the projector is and holds the digest of its file and of the backbone's shards. A
projector gives nonsense, without an error, on any other backbone's features.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from pipeline.cgroup import cores
from pipeline.checkpoint import Checkpoint, inside, read_json
from pipeline.digests import digest_file, digest_value
from pipeline.errors import CheckpointError
from pipeline.sections import Pooling, ProjectorKind, ProjectorTask

WEIGHTS = "projector.safetensors"
DESCRIPTION = "projector.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a projector is: a layer of `kind` from `in_features` values, pooled so, to `out_features` for a task.

    `hidden_features` is None for a linear one; `classes` are the names of the labels, in the order of the outputs, and
    None where the task is no classification.
    """

    kind: ProjectorKind
    pooling: Pooling
    in_features: int
    hidden_features: int | None
    out_features: int
    task: ProjectorTask
    classes: tuple[str, ...] | None


def is_projected(folder: Path) -> bool:
    """Whether a projector belongs to the folder's model."""
    return (folder / DESCRIPTION).is_file() or (folder / WEIGHTS).is_file()


def read_description(folder: Path) -> Description:
    """What the folder's projector is; raise CheckpointError where projector.json does not say so."""
    raw = _raw(folder)
    sizes = ("in_features", "out_features") + (("hidden_features",) if raw.get("kind") == "mlp" else ())
    for name, values in (("kind", ProjectorKind), ("pooling", Pooling), ("task", ProjectorTask)):
        if raw.get(name) not in get_args(values):
            raise _wrong(folder, name, raw.get(name), f"one of {', '.join(get_args(values))}")
    for name in sizes:
        if type(raw.get(name)) is not int or raw[name] < 1:
            raise _wrong(folder, name, raw.get(name), "a whole number above 0")
    classes = raw.get("classes")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(item, str) for item in classes)):
        raise _wrong(folder, "classes", classes, "a list of names")
    return Description(
        kind=raw["kind"],
        pooling=raw["pooling"],
        in_features=raw["in_features"],
        hidden_features=raw["hidden_features"] if raw["kind"] == "mlp" else None,
        out_features=raw["out_features"],
        task=raw["task"],
        classes=None if classes is None else tuple(classes),
    )


def write_description(folder: Path, description: Description) -> None:
    """Write projector.json, not yet sealed."""
    _write(folder, {**asdict(description), "backbone": None, "projector": None})


def carry(source: Path, folder: Path) -> None:
    """Copy the projector that lies in `source` beside the backbone in `folder`, and seal the two."""
    read_description(source)
    for name in (WEIGHTS, DESCRIPTION):
        shutil.copyfile(inside(source, name), folder / name)
    seal(folder)


def seal(folder: Path) -> None:
    """Write the digests of the backbone and of the projector, as they lie in the folder, into projector.json."""
    _write(folder, {**_raw(folder), **_digests(folder)})


def check(folder: Path) -> None:
    """Raise CheckpointError unless the folder's backbone and projector are the two that were sealed."""
    raw = _raw(folder)
    for name, digest in _digests(folder).items():
        if raw.get(name) is None:
            raise CheckpointError(f"{folder}: its projector was never sealed to a backbone; write the folder again")
        if raw[name] != digest:
            what = "its weights were" if name == "backbone" else f"{WEIGHTS} was"
            raise CheckpointError(
                f"{folder}: {what} changed since projector and backbone were sealed; take both from the same artifact"
            )


def _digests(folder: Path) -> dict[str, str]:
    shards = sorted(Checkpoint.open(folder).shards)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: {WEIGHTS} is missing; copy it from where {DESCRIPTION} came from")
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        *backbone, projector = pool.map(lambda name: digest_file(inside(folder, name)), [*shards, WEIGHTS])
    return {"backbone": digest_value(backbone), "projector": projector}


def _raw(folder: Path) -> dict[str, Any]:
    if not (folder / DESCRIPTION).is_file():
        raise CheckpointError(f"{folder}: {DESCRIPTION} is missing; copy it from where {WEIGHTS} came from")
    return read_json(inside(folder, DESCRIPTION))


def _write(folder: Path, raw: Mapping[str, Any]) -> None:
    beside = folder / f"{DESCRIPTION}.part"
    with beside.open("w", encoding="utf-8") as file:
        json.dump(raw, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.rename(folder / DESCRIPTION)


def _wrong(folder: Path, name: str, found: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{folder / DESCRIPTION}: {name} is {found!r}, expected {expected}; write it again")
