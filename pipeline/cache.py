"""The user's cache folder: what is in it can be made again, so losing it costs time, never correctness."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`requant` in $REQUANT_CACHE, $XDG_CACHE_HOME or ~/.cache, the first that is set; it may not exist yet."""
    base = os.environ.get("REQUANT_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "requant"
