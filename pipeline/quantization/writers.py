"""Which writer makes which target, what is checked before, and the process that each runs in."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Any

from pipeline import child
from pipeline.catalog import DENSE, format_to, require_libraries
from pipeline.checkpoint import Checkpoint
from pipeline.errors import UnsupportedFormat
from pipeline.kept import Donor
from pipeline.quantization import gptqmodel, kept_whole
from pipeline.quantization.folder import Order, Written
from pipeline.reloadable import check_reload
from pipeline.sizes import check_target, dense_sizes
from pipeline.targets import AWQTarget, BitsAndBytesTarget, GPTQTarget, Target

WRITERS: dict[type[Any], str] = {
    BitsAndBytesTarget: "pipeline.quantization.bitsandbytes:write",
    GPTQTarget: "pipeline.quantization.gptqmodel:write",
    AWQTarget: "pipeline.quantization.gptqmodel:write",
}


def check(dense: Checkpoint, targets: Iterable[Target]) -> None:
    """Raise UnsupportedFormat or MissingLibrary where one of the targets cannot be made from `dense`."""
    if dense.quantization is not None:
        raise UnsupportedFormat(
            f"{dense.path}: is quantized already ({dense.quantization.method}); upcast it, then quantize what comes out"
        )
    sizes = dense_sizes(dense, DENSE)
    for target in targets:
        require_libraries(format_to(target))
        check_reload(dense, sizes, target)
        check_target(sizes, target)


def write(order: Order, described_by: Donor | None = None) -> Written:
    """Write one quantized checkpoint, and clear the library's files away.

    A library runs in a process of its own; none does where every packed module is kept, as `described_by` says.
    """
    if described_by:
        written = kept_whole.write(order, described_by)
    else:
        written = child.run(WRITERS[type(order.target)], order, environment=gptqmodel.ENVIRONMENT)
    shutil.rmtree(order.scratch)
    return written
