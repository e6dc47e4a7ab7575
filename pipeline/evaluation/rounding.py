"""What kernels of quantized layers do to their inputs, done to a model that computes without them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.catalog import format_of
from pipeline.checkpoint import Checkpoint
from pipeline.formats import schemes


def activations_of(checkpoint: Checkpoint) -> str:
    """What a checkpoint's kernels round their layers' inputs to, as `rounded` takes it; empty where they do not."""
    if checkpoint.quantization is not None and checkpoint.quantization.method == "compressed-tensors":
        return schemes.activations(checkpoint.quantization)
    return format_of(checkpoint.quantization).activations


@contextmanager
def rounding(modules: Iterable[Any], activations: str) -> Iterator[None]:
    """Have the modules round their inputs to `activations` while the block lasts."""

    def hook(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounded(given[0], activations), *given[1:])

    handles = [module.register_forward_pre_hook(hook) for module in modules if activations]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rounded(values: Tensor, activations: str) -> Tensor:
    """`values` on a grid whose largest value is the largest of each token, or `by tensor` of all tokens.

    Of an `even` grid of integers the largest value lies half a step beyond the last: 127.5 steps for 8 bits.
    """
    if not activations:
        return values
    kind, *how = activations.split(" ", 1)
    by_tensor, even = "by tensor" in how, "even" in how
    wide = values.float()
    largest: Tensor = (wide.abs().amax() if by_tensor else wide.abs().amax(-1, keepdim=True)).clamp(min=1e-12)
    if kind == "float8":
        scale = largest / torch.finfo(torch.float8_e4m3fn).max
        return ((wide / scale).to(torch.float8_e4m3fn).float() * scale).to(values.dtype)
    # Four-bit floats have scales for less than a token, so that eight steps of it are no coarser.
    codes = 2 ** (int(kind.removeprefix("int").removeprefix("float")) - 1)
    scale = largest / (codes - (0.5 if even else 1))
    return torch.round(wide / scale).clamp(-codes, codes - 1).mul(scale).to(values.dtype)
