"""A packed module's components, checked one by one, and what its config says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import regex
import torch
from torch import Tensor

from pipeline.errors import CheckpointError, MissingTensor, NonFinite, UnsupportedFormat
from pipeline.quantization_config import Quantization
from pipeline.shards import TensorGroup

ALL = slice(None)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
WORDS = (torch.int32,)
NOT_FINITE = "holds NaN or infinity; train again with a lower learning rate, or download it again"  # after a name
PATTERN_SECONDS = 1.0  # a name takes microseconds; what takes longer was written to hang
_too_slow: set[str] = set()  # patterns that took longer once: a model has thousands of names to try them on


def require(
    group: TensorGroup, name: str, *, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None
) -> Tensor:
    """The component `name`; raise MissingTensor if absent, CheckpointError for another dtype, rank or shape.

    A dimension of -1 in `shape` may have any length.
    """
    if name not in group.tensors:
        raise MissingTensor(f"{group.module}: {name} is in no shard; the checkpoint is incomplete, download it again")
    tensor = group.tensors[name]
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{group.module}: {name} is {found}, expected {expected}; download the checkpoint again")
    if shape is not None and (
        tensor.ndim != len(shape) or any(n not in (-1, m) for n, m in zip(shape, tensor.shape, strict=True))
    ):
        expected = str([n if n >= 0 else "any" for n in shape]).replace("'", "")
        raise CheckpointError(
            f"{group.module}: {name} has shape {list(tensor.shape)}, expected {expected} from its other tensors and "
            "config.json; download the checkpoint again"
        )
    return tensor


def require_finite(group: TensorGroup, name: str, tensor: Tensor) -> Tensor:
    """`tensor` itself; raise NonFinite if a value of it is NaN or infinite."""
    if not all_finite(tensor):
        raise NonFinite(f"{group.module}: {name} holds NaN or infinity; the checkpoint is damaged, download it again")
    return tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; allocates nothing of the tensor's size, but for float8 twice that."""
    if not tensor.numel():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.half()  # which holds every float8; aminmax knows none
    low, high = torch.aminmax(tensor)  # both propagate NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))


def matches(pattern: str, name: str, *, key: str, anywhere: bool = False) -> bool:
    """Whether a regular expression from quantization_config's `key` matches `name` from its start, or `anywhere` in it.

    Raise CheckpointError where it is none, or takes longer than PATTERN_SECONDS: checkpoints come from anywhere.
    """
    where = f"config.json: quantization_config.{key} pattern {pattern[:80]!r}"
    slow = CheckpointError(f"{where} takes too long to match {name}; write a simpler one")
    if pattern in _too_slow:
        raise slow
    try:
        find = regex.search if anywhere else regex.match
        return find(pattern, name, timeout=PATTERN_SECONDS) is not None
    except TimeoutError as error:
        _too_slow.add(pattern)
        raise slow from error
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{where} is no regular expression ({error}); fix config.json") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How one module is quantized: `group_size` -1 is a whole channel; `ordered` says that desc_act was on."""

    bits: int
    group_size: int
    ordered: bool

    def groups(self, features: int) -> int:
        """Groups in a row of `features` weights; the last may be shorter."""
        return 1 if self.group_size == -1 else -(-features // self.group_size)


def grid_of(group: TensorGroup, quantization: Quantization, *, bits: tuple[int, ...]) -> Grid:
    """The module's grid; raise UnsupportedFormat unless its bits are among `bits`.

    gptqmodel's `dynamic` gives modules other values: the first pattern that matches from the start of the module's name
    counts; `+:` before it changes nothing, `-:` means that the module stays dense (gptqmodel, quantization/config.py).
    """
    override = _override(group.module, quantization.raw.get("dynamic") or {})
    try:
        grid = Grid(
            bits=int(override.get("bits", quantization.bits)),
            group_size=int(override.get("group_size", quantization.group_size)),
            ordered=bool(override.get("desc_act", quantization.raw.get("desc_act", False))),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{group.module}: quantization_config.dynamic has an unreadable value ({error})"
        ) from error
    if grid.bits not in bits:
        valid = ", ".join(map(str, bits))
        raise UnsupportedFormat(
            f"{group.module}: {quantization.method} with bits {grid.bits} cannot be read, only {valid}"
        )
    if grid.group_size != -1 and grid.group_size < 1:
        raise UnsupportedFormat(
            f"{group.module}: group size {grid.group_size} cannot be read; it is -1 or a positive number"
        )
    return grid


def _override(module: str, dynamic: Any) -> dict[str, Any]:
    if not isinstance(dynamic, dict):
        raise CheckpointError(
            f"config.json: quantization_config.dynamic is {type(dynamic).__name__}, expected an object of patterns"
        )
    for pattern, values in dynamic.items():
        if not matches(regex.sub(r"^[-+]:", "", pattern), module, key="dynamic"):
            continue
        if pattern.startswith("-:"):
            raise CheckpointError(
                f"{module}: is packed, but quantization_config.dynamic {pattern!r} says it is dense; fix config.json"
            )
        if values is not None and not isinstance(values, dict):
            raise CheckpointError(
                f"config.json: quantization_config.dynamic {pattern!r} is {type(values).__name__}, expected an object"
            )
        return dict(values or {})
    return {}
