"""A quantized folder of which every packed module is copied: no library is started and nothing is calibrated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline import progress
from pipeline.catalog import format_to
from pipeline.checkpoint import Checkpoint
from pipeline.kept import Donor
from pipeline.quantization.activation_scales import scales_of
from pipeline.quantization.copies import Copies
from pipeline.quantization.folder import Order, Written, check_finite, finish
from pipeline.quantization.heads import kept_dense, left_dense
from pipeline.shard_writer import ShardWriter
from pipeline.shards import DTYPE_NAMES, ShardReader

# Where a config names the modules that stay dense; GPTQ's names none.
NOT_CONVERTED = {"awq": "modules_to_not_convert", "bitsandbytes": "llm_int8_skip_modules"}


def write(order: Order) -> Written:
    """Write `order.out`: packed modules from the donors in `order.kept`, all else from the parent.

    Raise NonFinite for a NaN or infinity among the parent's tensors, ReloadMismatch where a donor has other bytes than
    were noted. Layers of a folded donor have its dense tensors too.
    """
    assert order.described_by
    parent = order.clear()
    copies = Copies(order.kept, format_to(order.target))
    ones = scales_of(order.target, parent, trust_remote_code=order.trust_remote_code)
    shapes = dict(_shapes(parent, copies))
    shapes |= {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in ones.items()}
    order.out.mkdir(parents=True)
    with ShardReader(parent) as dense, ShardWriter(order.out, shapes, noted=True) as writer:
        for done, name in enumerate(shapes, start=1):
            tensor = ones[name] if name in ones else copies[name] if name in copies.shapes else dense[name]
            if name not in copies.shapes:
                check_finite(name, tensor)
            writer.write(name, tensor)
            progress.step("quantize", done=done, total=len(shapes), unit=f"{order.target.variant} tensors")
    quantization = _quantization(order, parent, order.described_by)
    return finish(order, parent, quantization=quantization, digests=writer.digests)


def _shapes(parent: Checkpoint, copies: Copies) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Tensor to write → dtype and shape, in the parent's order."""
    for name, info in parent.tensors.items():
        parts = copies.parts.get(name.removesuffix(".weight"), ()) if name.endswith(".weight") else ()
        for part in parts or (name,):
            yield part, copies.shapes.get(part, (info.dtype, info.shape))


def _quantization(order: Order, parent: Checkpoint, donor: Donor) -> dict[str, Any]:
    """The donor's own config, which also names what of the parent stays dense where it must be."""
    quantization = Checkpoint.open(donor.folder).quantization
    assert quantization is not None
    raw = dict(quantization.raw)
    if order.target.format == "compressed-tensors":
        ignored = left_dense(parent, order.kept, trust_remote_code=order.trust_remote_code)
        return {**raw, "ignore": sorted({*ignored, *(raw.get("ignore") or ())})}
    key = NOT_CONVERTED.get(order.target.format)
    if key and (head := kept_dense(parent, trust_remote_code=order.trust_remote_code)):
        raw[key] = sorted({*head, *(raw.get(key) or ())})
    return raw
