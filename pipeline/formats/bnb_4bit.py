"""bitsandbytes NF4 and FP4, with and without double quantization.

On disk (bitsandbytes, functional.py `QuantState.as_dict(packed=True)` and backends/default/ops.py), N = O * I:

- `weight`: ceil(N / 2) bytes, the even element in the HIGH nibble; stored as uint8 or, through quant_storage, as any
  other dtype of the same bytes.
- `weight.quant_map`: float32 [16], what each code stands for: NF4's and FP4's only difference on disk.
- `weight.absmax`: float32 [ceil(N / blocksize)].
- `weight.quant_state.bitsandbytes__nf4` (`__fp4`): a JSON object as uint8: quant_type, blocksize, dtype, shape.
- double quantization: `absmax` is uint8, `weight.nested_absmax` float32 [ceil(blocks / nested_blocksize)],
  `weight.nested_quant_map` float32 [256], and nested_blocksize and nested_offset in the JSON.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import CheckpointError, MissingTensor, UnsupportedFormat
from pipeline.formats.components import ALL, FLOATS, require, require_finite
from pipeline.formats.words import look_up
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

STATE = "weight.quant_state.bitsandbytes__"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that bitsandbytes has kernels for


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int
    nested_offset: float


def dense_shape(group: TensorGroup, quantization: Quantization) -> tuple[int, ...]:  # noqa: ARG001 - the state says all
    """The shape that the module's quant_state names, checked against the bytes there are."""
    state = _state(group)
    packed = _packed(group)
    if packed.numel() != -(-math.prod(state.shape) // 2):
        raise CheckpointError(
            f"{group.module}: weight has {packed.numel()} bytes, but its quant_state says shape {list(state.shape)}; "
            "download the checkpoint again"
        )
    _scale_parts(group, state)
    return state.shape


def dequantize(group: TensorGroup, quantization: Quantization, rows: slice = ALL) -> Tensor:
    """float32 [R, I]: quant_map[code] * absmax of its block, in float32 as bitsandbytes computes it."""
    shape = dense_shape(group, quantization)
    state, packed = _state(group), _packed(group)
    width = math.prod(shape[1:])
    first, last = (width * row for row in rows.indices(shape[0])[:2])
    before = first % state.blocksize  # weights of the first block that belong to the row above
    scales = _scales(group, state, slice((first - before) // state.blocksize, -(-last // state.blocksize)))
    codes = require_finite(
        group, "weight.quant_map", require(group, "weight.quant_map", dtypes=FLOATS, shape=(16,)).float()
    )
    every = torch.arange(256, device=codes.device)
    pairs = torch.stack((codes[every >> 4], codes[every & 15]), dim=1)
    packed = packed[(first - before) // 2 : -(-last // 2)]
    out = torch.empty(2 * packed.numel(), dtype=torch.float32, device=packed.device)
    look_up(pairs, packed, out)
    _scale(out, scales, state.blocksize)
    return out[before : before + last - first].view(-1, *shape[1:])


def _scale(values: Tensor, scales: Tensor, blocksize: int) -> None:
    """Multiply each block of `values` by its scale, in place; the last block may be short."""
    blocks, rest = divmod(values.numel(), blocksize)
    values[: blocks * blocksize].view(blocks, blocksize).mul_(scales[:blocks, None])
    if rest:
        values[blocks * blocksize :].mul_(scales[blocks])


def _scales(group: TensorGroup, state: _State, which: slice) -> Tensor:
    """The scales of the blocks `which`."""
    absmax, *double = _scale_parts(group, state)
    values = absmax[which]
    if double:
        nested, table = (tensor.float() for tensor in double)
        outer = torch.arange(which.start, which.stop, device=values.device) // state.nested_blocksize
        values = table[values.int()] * nested[outer] + state.nested_offset
    return require_finite(group, "weight.absmax", values.float())


def _scale_parts(group: TensorGroup, state: _State) -> tuple[Tensor, ...]:
    """What the scales are made of, checked: absmax; or its codes, nested_absmax and nested_quant_map."""
    name, blocks = "weight.absmax", -(-math.prod(state.shape) // state.blocksize)
    if "weight.nested_absmax" not in group.tensors:
        return (require(group, name, dtypes=FLOATS, shape=(blocks,)),)
    nested = -(-blocks // state.nested_blocksize)
    return (
        require(group, name, dtypes=(torch.uint8,), shape=(blocks,)),
        require(group, "weight.nested_absmax", dtypes=FLOATS, shape=(nested,)),
        require(group, "weight.nested_quant_map", dtypes=FLOATS, shape=(256,)),
    )


def _packed(group: TensorGroup) -> Tensor:
    """The weight's bytes, uint8 [ceil(N / 2)]."""
    if "weight" not in group.tensors:
        raise MissingTensor(f"{group.module}: weight is in no shard; the checkpoint is incomplete, download it again")
    return group.tensors["weight"].contiguous().flatten().view(torch.uint8)


def _state(group: TensorGroup) -> _State:
    names = [name for name in group.tensors if name.startswith(STATE)]
    if len(names) != 1:
        raise MissingTensor(
            f"{group.module}: has {len(names)} quant_state tensors, expected 1; the checkpoint is incomplete, "
            "download it again"
        )
    raw = _json(group, names[0])
    try:
        kind, shape = str(raw["quant_type"]), tuple(int(n) for n in raw["shape"])
        blocksize, nested_blocksize = int(raw["blocksize"]), int(raw.get("nested_blocksize", 256))
        offset = float(raw.get("nested_offset", 0.0))
        valid = min(shape, default=0) > 0 and nested_blocksize > 0 and math.isfinite(offset)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{group.module}: its quant_state cannot be read ({error!r}); {_AGAIN}") from error
    if not valid:
        raise CheckpointError(
            f"{group.module}: its quant_state says shape {list(shape)}, nested_blocksize {nested_blocksize}, "
            f"nested_offset {offset}, which cannot be; {_AGAIN}"
        )
    if kind not in {"nf4", "fp4"} or blocksize not in BLOCK_SIZES:
        raise UnsupportedFormat(
            f"{group.module}: bitsandbytes {kind} in blocks of {blocksize} cannot be read, only nf4 and fp4 in "
            f"blocks of {', '.join(map(str, BLOCK_SIZES))}"
        )
    return _State(shape=shape, blocksize=blocksize, nested_blocksize=nested_blocksize, nested_offset=offset)


_AGAIN = "download the checkpoint again"


def _json(group: TensorGroup, name: str) -> dict[str, Any]:
    raw = require(group, name, dtypes=(torch.uint8,), shape=(-1,))
    try:
        value = json.loads(bytes(raw.cpu().numpy()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{group.module}: its quant_state is not JSON ({error}); {_AGAIN}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{group.module}: its quant_state is {type(value).__name__}, not an object; {_AGAIN}")
    return value
