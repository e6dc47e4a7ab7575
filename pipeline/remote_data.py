"""Rows that lie elsewhere, copied once into the cache folder: a hub dataset's split, or the files behind a URL.

A copy is keyed by what the other side says of its content (the revision's commit, a file's ETag), so a change there is
a new copy here. It appears by a rename, whole or not at all.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline import progress
from pipeline.cache import cache_folder
from pipeline.data_files import READERS, known_suffix
from pipeline.errors import DataError, MissingLibrary

# org/name, then a configuration and a revision, where it has any.
HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What object stores call the digest or version of a file's content, in fsspec's account of it.
_TAGS = ("ETag", "etag", "md5Hash", "Content-MD5", "checksum")


def fetched_url(url: str) -> Path:
    """The local copy of the file at `url`, or the folder of copies where a folder or a glob is named.

    Raise DataError where it cannot be had, MissingLibrary where the scheme's library is not installed.
    """
    system, path = _file_system(url)
    try:
        system.invalidate_cache()  # or a long-lived process would not see a new file
        files = _files(system, path, url)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file or folder; check the name") from error
    except Exception as error:  # each file system has errors of its own, not all of them OSError
        raise DataError(f"{url}: cannot be read ({_said(error)}); check the name and the credentials") from error
    key = sha256(json.dumps([url, sorted(files.items())]).encode()).hexdigest()[:20]
    folder = cache_folder() / "data" / "url" / key

    def download(into: Path) -> None:
        for number, name in enumerate(sorted(files)):
            try:
                # Numbered, so that equal names and names that would lead elsewhere do no harm.
                system.get_file(name, str(into / f"{number:05d}-{_base(name)}"))
            except Exception as error:  # as above
                raise DataError(f"{url}: {name} did not arrive ({_said(error)}); try again") from error
            progress.step("data", done=number + 1, total=len(files), unit="files")

    _once(folder, download)
    copies = sorted(folder.iterdir())
    return copies[0] if len(copies) == 1 else folder


def fetched_hub(reference: str, *, split: str) -> Path:
    """The local copy of a hub dataset's split, one Parquet file; `reference` is org/name[:config][@revision].

    Raise DataError where it cannot be had, MissingLibrary where the datasets library is not installed.
    """
    match = HUB.fullmatch(reference)
    assert match, reference
    folder = cache_folder() / "data" / "hub" / match["id"].replace("/", "--")
    commit = _commit(folder, match["id"], match["revision"])
    copy = folder / commit / _file_name(match["config"] or "default") / _file_name(split)

    def download(into: Path) -> None:
        load_split(match["id"], config=match["config"], revision=commit, split=split, to=into / "rows.parquet")

    _once(copy, download)
    return copy / "rows.parquet"


def load_split(dataset: str, *, config: str | None, revision: str | None, split: str, to: Path) -> None:
    """Write one split of what `datasets.load_dataset` finds, on the hub or in a folder, to a Parquet file."""
    try:
        import datasets
    except ImportError as error:
        raise MissingLibrary(f"{dataset}: hub datasets need datasets; run pip install 'requant[data]'") from error
    shown = datasets.utils.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # the engine never prints
    progress.message("data", f"fetches {dataset}, split {split}")
    try:
        rows = datasets.load_dataset(dataset, name=config, revision=revision, split=split)
        rows.to_parquet(str(to))
    except Exception as error:  # datasets, the hub client and Arrow each have a tree of errors
        raise DataError(
            f"{dataset}: its split {split} cannot be loaded ({_said(error)}); check name and split"
        ) from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0]
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        remedy = "run pip install 'requant[s3]'" if scheme in {"s3", "s3a"} else f"install it ({_said(error)})"
        raise MissingLibrary(f"{url}: the library for {scheme}:// is not installed; {remedy}") from error
    except ValueError as error:
        raise DataError(f"{url}: {scheme}:// is not a scheme that fsspec knows; name an s3:// URL or a path") from error
    return system, str(path)


def _files(system: Any, path: str, url: str) -> Mapping[str, str]:
    """File → what tells its content from another, for each file of rows behind the path."""
    if "*" in path or "[" in path:  # a question mark is a query's beginning in many URLs
        found = [name for name, info in system.glob(path, detail=True).items() if info["type"] == "file"]
    elif system.info(path)["type"] == "directory":
        found = [name for name in system.find(path) if PurePosixPath(_base(name)).suffix.lower() in READERS]
        found = [name for name in found if not _base(name).startswith(".")]
    else:
        found = [path]
    if not found:
        raise DataError(f"{url}: no file of rows is there; the known suffixes are {', '.join(READERS)}")
    for name in found:
        known_suffix(PurePosixPath(name.partition("?")[0]))
    return {str(name): _tag(system, name) for name in found}


def _tag(system: Any, name: str) -> str:
    info = system.info(name)
    known = [str(info[key]) for key in _TAGS if info.get(key)]
    return known[0] if known else json.dumps(info, sort_keys=True, default=str)


def _base(name: str) -> str:
    """The last part of a remote path, without a query."""
    return PurePosixPath(name.partition("?")[0]).name


def _commit(folder: Path, dataset: str, revision: str | None) -> str:
    """The commit that a revision names now; where the hub cannot be asked, the one that it named last time."""
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{dataset}@{revision}" if revision else dataset
    known = folder / "revisions" / _file_name(revision or "main")
    try:
        commit = str(HfApi().dataset_info(dataset, revision=revision, timeout=30).sha)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise DataError(f"{where}: no such file, and no such hub dataset ({_said(error)}); check the name") from error
    except Exception as error:  # the hub's client passes on the errors of its HTTP library
        if not known.is_file():
            raise DataError(
                f"{where}: no such file, and the hub cannot be asked for a dataset of that name ({_said(error)}); "
                "check the path, or the network and HF_HUB_OFFLINE"
            ) from error
        commit = known.read_text(encoding="utf-8")
        progress.message("data", f"the hub cannot be asked for {where}; takes its commit {commit[:12]}, as last time")
        return commit
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_text(commit, encoding="utf-8")
    return commit


def _once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` fill the folder, unless it is there; two processes may do so at once."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".part-"))
    try:
        fill(beside)
        beside.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _file_name(text: str) -> str:
    """`text` as a file's name; what a name cannot hold is replaced, and its digest keeps it apart from others."""
    plain = re.sub(r"[^\w-]", "_", text)
    return plain if plain == text else f"{plain}-{sha256(text.encode()).hexdigest()[:8]}"


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
