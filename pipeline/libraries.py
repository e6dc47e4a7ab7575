"""Whether the libraries that a format or a target needs are installed; none is imported."""

from __future__ import annotations

import importlib.util

from pipeline.catalog import Format, format_to
from pipeline.errors import MissingLibrary
from pipeline.targets import AWQTarget, Target


def require_for(target: Target) -> None:
    """Raise MissingLibrary where a library is absent that writes a target, or that loads what is written."""
    require_libraries(format_to(target))
    if isinstance(target, AWQTarget) and target.engine == "autoawq" and importlib.util.find_spec("awq") is None:
        raise MissingLibrary(
            f"{target.variant}: engine autoawq is not installed; run pip install 'requant[autoawq]', or leave it out"
        )


def require_libraries(row: Format) -> None:
    """Raise MissingLibrary, with the command that installs it, where a format's library is absent."""
    for library in row.libraries:
        if importlib.util.find_spec(library) is None:
            package = library.replace("_", "-")
            extra = package if package in {"bitsandbytes", "compressed-tensors", "gguf"} else "gptqmodel"
            raise MissingLibrary(
                f"{row.title} needs {package}, which is not installed; run pip install 'requant[{extra}]'"
            )
