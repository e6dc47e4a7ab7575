"""What a checkpoint is, what it can become, and what is wrong with it; no weight is loaded, nothing is written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pipeline.catalog import Format, format_of
from pipeline.checkpoint import Checkpoint, architecture_of
from pipeline.errors import InputError
from pipeline.libraries import require_for
from pipeline.reloadable import check_reload
from pipeline.sizes import Sizes, check_target, dense_sizes, packed_modules
from pipeline.targets import AWQTarget, BitsAndBytesTarget, CompressedTensorsTarget, GGUFTarget, GPTQTarget, Target
from pipeline.trainability import ask
from pipeline.upcasting.layout import laid_out

TARGETS: tuple[Target, ...] = (
    BitsAndBytesTarget(format="bitsandbytes"), BitsAndBytesTarget(format="bitsandbytes", bits=8),
    GPTQTarget(format="gptq"), AWQTarget(format="awq"),
    CompressedTensorsTarget(format="compressed-tensors", scheme="w4a16"),
    CompressedTensorsTarget(format="compressed-tensors", scheme="w8a8"),
    CompressedTensorsTarget(format="compressed-tensors", scheme="fp8"),
    GGUFTarget(format="gguf"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a checkpoint without loading it; None where that cannot be known.

    `bits` maps the bits of a code to how many modules have them, `group_size` counts weights (-1: a whole channel).
    `ignored` are the modules that the config keeps dense. `becomes` maps a target to why it cannot be made after an
    upcast, or to nothing where it can. `trainable` is what the installed quantizer says of training adapters on the
    packed model as it stands, `dropped` what an upcast leaves out and why, `problems` what keeps it from being one.
    """

    path: str
    architecture: str
    format: str
    layout: str | None
    bits: Mapping[int, int]
    group_size: int | None
    symmetric: bool | None
    ignored: tuple[str, ...]
    parameters: int | None
    bytes: int
    bytes_as_bfloat16: int | None
    shards: int
    trainable: str
    becomes: Mapping[str, str]
    dropped: Mapping[str, str]
    problems: tuple[str, ...]


def facts(checkpoint: Checkpoint, trust_remote_code: bool) -> dict[str, Any]:  # noqa: FBT001  # the child's body takes positions
    """`inspect` as plain values, for a caller that has no use for torch; the body of the child process."""
    return asdict(inspect(checkpoint, trust_remote_code=trust_remote_code))


def inspect(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Facts:
    """The facts of a checkpoint that opens."""
    quantization, row, sizes = checkpoint.quantization, None, None
    problems: list[str] = []
    dropped: Mapping[str, str] = {}
    try:
        row = format_of(quantization)
        sizes = dense_sizes(checkpoint, row)
        dropped, found = _upcast(checkpoint, row, trust_remote_code=trust_remote_code)
        problems += found
    except InputError as error:
        problems.append(str(error))
    raw = quantization.raw if quantization else {}
    return Facts(
        path=str(checkpoint.path),
        architecture=_architecture(checkpoint),
        format=row.title if row else str(quantization and quantization.method),
        layout=next(
            (str(raw[key]) for key in ("checkpoint_format", "version", "packing_format", "format") if raw.get(key)),
            None,
        ),
        bits=_bits(checkpoint, row, sizes) if row and sizes else {},
        group_size=quantization.group_size if quantization else None,
        symmetric=quantization.symmetric if quantization else None,
        ignored=quantization.ignored if quantization else (),
        parameters=sizes.parameters if sizes else None,
        bytes=checkpoint.nbytes,
        bytes_as_bfloat16=sizes.dense_bytes("bfloat16") if sizes else None,
        shards=len(checkpoint.shards),
        trainable=_trainable(checkpoint, trust_remote_code=trust_remote_code),
        becomes={target.variant: _obstacle(checkpoint, target, sizes) for target in TARGETS}
        if sizes and not problems
        else {},
        dropped=dropped,
        problems=tuple(dict.fromkeys(problems)),
    )


def _architecture(checkpoint: Checkpoint) -> str:
    """The class that config.json names, or else its model_type."""
    return architecture_of(checkpoint.config) or checkpoint.model_type or "unknown"


def _upcast(checkpoint: Checkpoint, row: Format, *, trust_remote_code: bool) -> tuple[Mapping[str, str], list[str]]:
    """What an upcast would drop, and what it would stop at: all of it, where the upcast stops at the first."""
    with laid_out(checkpoint, row, dtype=torch.bfloat16, trust_remote_code=trust_remote_code) as layout:
        return layout.dropped, [str(problem) for problem in layout.problems]


def _bits(checkpoint: Checkpoint, row: Format, sizes: Sizes) -> dict[int, int]:
    """Bits of a code → packed modules that have them; the codes are a module's largest tensor."""
    counts: Counter[int] = Counter()
    for module, parts in packed_modules(checkpoint, row).items():
        infos = [checkpoint.tensors[module + part] for part in parts]
        # A GGUF tensor has its dense shape itself, and the sizes call it by another name.
        shape = checkpoint.tensors[module].shape if checkpoint.is_gguf else sizes.shapes[row.dense_name(module, parts)]
        weights = math.prod(shape)
        counts[round(8 * max(info.end - info.start for info in infos) / max(1, weights))] += 1
    return dict(sorted(counts.items()))


def _obstacle(checkpoint: Checkpoint, target: Target, sizes: Sizes) -> str:
    try:
        require_for(target)
        check_reload(checkpoint, sizes, target)
        check_target(sizes, target)
    except InputError as error:
        return str(error)
    return ""


def _trainable(checkpoint: Checkpoint, *, trust_remote_code: bool) -> str:
    """What the quantizer that transformers would load the checkpoint with says of training on it."""
    if checkpoint.quantization is None:
        return "every weight, or adapters"
    if checkpoint.quantization.mixed:
        return "after an upcast only"  # transformers does not load it
    answer = ask(checkpoint.config, checkpoint.quantization.raw, trust_remote_code)
    if answer.adapters:
        return "adapters on top, or after an upcast"
    return (
        f"after an upcast; as it stands nobody can tell ({answer.reason})" if answer.reason else "after an upcast only"
    )
