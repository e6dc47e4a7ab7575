"""Which writer makes which target, what is checked before, and the process that each runs in."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence

from pipeline import child
from pipeline.bit_budget import check_budget
from pipeline.catalog import DENSE, require_for
from pipeline.checkpoint import Checkpoint
from pipeline.errors import UnsupportedFormat
from pipeline.quantization import gptqmodel, kept_whole
from pipeline.quantization.folder import Order, Written
from pipeline.reloadable import check_reload
from pipeline.sizes import check_target, dense_sizes
from pipeline.targets import Target, is_own

# What does not share the calibration pass: by format, or by the engine that a target names.
WRITERS = {
    "bitsandbytes": "pipeline.quantization.bitsandbytes:write",
    "gguf": "pipeline.quantization.gguf:write",
    "gptqmodel": "pipeline.quantization.gptqmodel:write",
    "autoawq": "pipeline.quantization.autoawq:write",
}


def check(dense: Checkpoint, targets: Iterable[Target]) -> None:
    """Raise UnsupportedFormat or MissingLibrary where one of the targets cannot be made from `dense`."""
    if dense.quantization is not None:
        raise UnsupportedFormat(
            f"{dense.path}: is quantized already ({dense.quantization.method}); upcast it, then quantize what comes out"
        )
    sizes = dense_sizes(dense, DENSE)
    for target in targets:
        require_for(target)
        check_reload(dense, sizes, target)
        check_target(sizes, target)
        check_budget(sizes, target)


def write(orders: Sequence[Order]) -> Iterator[tuple[Order, Written]]:
    """Write quantized checkpoints of one parent, each as soon as it is whole, and clear away what they needed.

    Where every packed module is kept nothing is started. Those of Requant's own engine share a process and a
    calibration pass; every other has a process of its own.
    """
    kept = [order for order in orders if order.described_by]
    own = [order for order in orders if order not in kept and is_own(order.target)]
    written: Written
    for order in orders:
        if order in kept:
            written = kept_whole.write(order)
            yield _cleared(order), written
        elif order not in own:
            writer = WRITERS[getattr(order.target, "engine", order.target.format)]
            written = child.run(writer, order, environment=gptqmodel.ENVIRONMENT)
            yield _cleared(order), written
    if own:
        found: list[Written] = child.run("pipeline.quantization.engine:write", own)
        yield from zip(map(_cleared, own), found, strict=True)


def _cleared(order: Order) -> Order:
    shutil.rmtree(order.scratch)
    return order
