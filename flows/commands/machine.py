"""Commands about this machine and about what can be done on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import psutil
from cyclopts import Parameter

from flows.figures import size
from flows.terminal import print_json, print_table
from pipeline.catalog import FORMATS

Json = Annotated[bool, Parameter(name="--json", negative="")]
# Library → what it is needed for, and the extra that installs it.
OPTIONAL = {
    "bitsandbytes": ("quantize to and reload NF4, FP4, int8", "bitsandbytes"),
    "gguf": ("read and write GGUF files", "gguf"),
    "gptqmodel": ("quantize to and reload GPTQ and AWQ", "gptqmodel"),
    "optimum": ("reload GPTQ", "gptqmodel"),
    "pyarrow": ("read Parquet rows", "parquet"),
}
REQUIRED = ("torch", "transformers", "accelerate", "peft", "safetensors", "prefect")


def formats(*, json: Json = False) -> None:
    """Show the formats: how each is read, trained on, written and loaded again.

    Parameters
    ----------
    json
        Print one JSON document.

    """
    rows = [
        {
            "format": row.title,
            "bits": ", ".join(map(str, row.bits)),
            "dequantize": row.dequantize,
            "train on top": row.train,
            "quantize to": row.quantize,
            "reload": row.reload,
        }
        for row in FORMATS.values()
    ]
    print_json({"formats": rows}) if json else print_table("formats", rows)


def doctor(*, store: str = "artifacts", json: Json = False) -> None:
    """Say what this machine can do, and what is missing for what.

    Parameters
    ----------
    store
        The store whose disk is looked at.
    json
        Print one JSON document.

    """
    findings = [*_machine(Path(store)), *_libraries(), _server()]
    if json:
        print_json({"findings": findings})
    else:
        print_table("this machine", findings)


def _machine(store: Path) -> list[dict[str, str]]:
    import torch

    existing = next(path for path in (store.resolve(), *store.resolve().parents) if path.exists())
    disk, memory = shutil.disk_usage(existing), psutil.virtual_memory()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = ", ".join(f"{gpu.name}, {size(gpu.total_memory)}" for gpu in gpus)
    return [
        _finding("python", platform.python_version(), ok=True),
        _finding("cores", str(os.cpu_count()), ok=True),
        _finding("memory", f"{size(memory.available)} free of {size(memory.total)}", ok=True),
        _finding(
            "disk",
            f"{size(disk.free)} free at {existing}",
            ok=disk.free > 10**9,
            remedy="free some, or use another store",
        ),
        _finding("GPU", found or "none", ok=True, remedy="" if gpus else "everything runs on the CPU"),
    ]


def _libraries() -> list[dict[str, str]]:
    found = []
    for library in REQUIRED:
        version = _version(library)
        found.append(_finding(library, version or "missing", ok=bool(version), remedy="install requant again"))
    for library, (purpose, extra) in OPTIONAL.items():
        version = _version(library)
        remedy = f"needed to {purpose}: pip install 'requant[{extra}]'"
        found.append(_finding(library, version or "missing", ok=bool(version), remedy=remedy))
    return found


def _server() -> dict[str, str]:
    import httpx

    address = os.environ.get("PREFECT_API_URL")
    if not address:
        return _finding("Prefect server", "none named: each run starts a temporary one", ok=True)
    try:
        httpx.get(f"{address.rstrip('/')}/health", timeout=5).raise_for_status()
        return _finding("Prefect server", address, ok=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return _finding("Prefect server", f"{address}: {error}", ok=False, remedy="start it, or unset PREFECT_API_URL")


def _finding(what: str, found: str, *, ok: bool, remedy: str = "") -> dict[str, str]:
    shown: dict[str, Any] = {
        "what": what,
        "found": found,
        "state": "ok" if ok else "missing",
        "remedy": remedy if not ok else "",
    }
    if ok and remedy and found == "none":
        shown["remedy"] = remedy
    return {key: str(value) for key, value in shown.items()}


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
