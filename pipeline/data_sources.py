"""Where rows lie: a file, a folder, a glob, a hub dataset or a URL, each as files on this machine."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from pipeline.data_files import READERS, known_suffix
from pipeline.errors import DataError
from pipeline.remote_data import HUB, fetched_hub, fetched_url
from pipeline.sections import Data


def located(data: Data) -> tuple[Path, ...]:
    """The local files that hold the rows, in order; what lies elsewhere is fetched once and kept in the cache folder.

    Of a folder these are all files below it whose suffix is known, except hidden ones, sorted by name. Raise DataError
    where there is none, or where one of them cannot hold rows.
    """
    path = Path(localised(data).path)
    if path.is_file():
        known_suffix(path)
        return (path,)
    found = _below(path) if path.is_dir() else _matching(str(path))
    if not found:
        raise DataError(f"{data.path}: no file of rows is there; the known suffixes are {', '.join(READERS)}")
    return found


def localised(data: Data) -> Data:
    """The same rows by an absolute path on this machine, which needs no network: a file, a folder or a glob."""
    if "://" in data.path:
        return data.model_copy(update={"path": str(fetched_url(data.path))})
    path = Path(data.path).expanduser()
    if not data.path.strip():
        raise DataError("data.path is empty; name a file of rows")
    try:
        there = path.exists()
    except OSError as error:
        raise DataError(f"{data.path}: {error.strerror}; name a readable file") from error
    if there:
        return data.model_copy(update={"path": str(path.absolute())})
    if glob.has_magic(data.path):
        # The folder that this runs in may have brackets in its name.
        pattern = path if path.is_absolute() else Path(glob.escape(str(Path.cwd()))) / path
        return data.model_copy(update={"path": str(pattern)})
    if _may_be_on_the_hub(data.path):
        return data.model_copy(update={"path": str(fetched_hub(data.path, split=data.split))})
    raise DataError(
        f"{data.path}: no such file or folder; name a JSONL, CSV, Parquet or text file, a folder or glob of such, "
        "a hub dataset such as org/name, or an s3:// URL"
    )


def _may_be_on_the_hub(path: str) -> bool:
    """Whether a path that is not there could be a hub dataset's name, and not a file's that is misspelt."""
    if HUB.fullmatch(path) is None or path.startswith(".") or Path(path).suffix.lower() in READERS:
        return False
    return not Path(path).parent.is_dir()


def _below(folder: Path) -> tuple[Path, ...]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}; name a readable folder") from error

    found = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return tuple(sorted((path for path in found if path.suffix.lower() in READERS), key=Path.as_posix))


def _matching(pattern: str) -> tuple[Path, ...]:
    # Path.glob takes no absolute pattern and finds hidden files too.
    matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 - the reason stands above
    found = sorted(path for path in map(Path, matches) if path.is_file())
    for path in found:
        known_suffix(path)
    return tuple(found)
