"""Which writer makes which target, what is checked before, and the process that each runs in."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence

from pipeline import child
from pipeline.bit_budget import check_budget
from pipeline.catalog import DENSE
from pipeline.checkpoint import Checkpoint
from pipeline.errors import ReloadMismatch, UnsupportedFormat
from pipeline.evaluation.tasks import ENVIRONMENT
from pipeline.libraries import require_for
from pipeline.quantization import kept_whole
from pipeline.quantization.folder import Order, Written
from pipeline.quantization.reloaded import Reload, Reloaded
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


def write(orders: Sequence[Order]) -> Iterator[list[tuple[Order, Written]]]:
    """Write quantized checkpoints of one parent, those of one process together, and clear away what it needed.

    Where every packed module is kept nothing is started. Those of Requant's own engine share a process and a
    calibration pass; every other has a process of its own.
    """
    kept = [order for order in orders if order.described_by]
    own = [order for order in orders if order not in kept and is_own(order.target)]
    if kept:
        yield _cleared(kept, [kept_whole.write(order) for order in kept])
    for order in orders:
        if order not in kept and order not in own:
            writer = WRITERS[getattr(order.target, "engine", order.target.format)]
            written: Written = child.run(writer, order, environment=ENVIRONMENT)
            yield _cleared([order], [written])
    if own:
        yield _cleared(own, child.run("pipeline.quantization.engine:write", own))


def _cleared(orders: Sequence[Order], written: Sequence[Written]) -> list[tuple[Order, Written]]:
    for order in orders:
        shutil.rmtree(order.scratch)
    return list(zip(orders, written, strict=True))


def reload(made: Sequence[tuple[Order, Written]]) -> list[Reloaded | ReloadMismatch]:
    """Whether each folder is the model that was meant, asked in a process of their own: its libraries load once."""
    reloads = [Reload.of(order, written) for order, written in made]
    found: list[Reloaded | ReloadMismatch] = child.run(
        "pipeline.quantization.reload:check", reloads, environment=ENVIRONMENT
    )
    return found
