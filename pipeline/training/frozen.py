"""Digests of what must not change while a model trains: its frozen parameters, its buffers, its quantized scales."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from pipeline.cgroup import cores
from pipeline.errors import CheckFailed

CHUNK = 1 << 26  # bytes that go from a GPU to the CPU at once
# What bitsandbytes keeps beside a weight, neither parameter nor buffer: Params4bit.quant_state, Linear8bitLt.state.
_SCALES = ("absmax", "code", "offset", "SCB")


def frozen_digests(model: torch.nn.Module, *, changing: Callable[[str], bool] = lambda _: False) -> dict[str, str]:
    """Name → SHA-256 of the bytes of every frozen parameter, stored buffer and bitsandbytes scale, on every core.

    Buffers that the architecture computes for itself (not persistent) are left out, as are those that `changing` names.
    The 4-bit weights of bitsandbytes are repacked in place by the first forward pass on a CPU with AVX512-BF16, and
    unpacked by a save: let the model run without gradients right before each call. Nothing is copied but a chunk.
    """
    tensors = {name: tensor for name, tensor in _frozen(model) if not changing(name)}
    with ThreadPoolExecutor(max_workers=cores()) as pool:
        return dict(zip(tensors, pool.map(_digest, tensors.values()), strict=True))


def check_frozen(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Raise CheckFailed where a frozen tensor is not, byte for byte, what it was."""
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise CheckFailed(
            f"train: {changed[0]}{and_others(len(changed) - 1)} changed while frozen; the result is not what the "
            "method says, so it was not kept: report this with the recipe"
        )


def and_others(others: int) -> str:
    """How many more there are of a thing that was named."""
    return f" and {others:,} other{'s' if others > 1 else ''}" if others else ""


def _frozen(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, parameter.data
            yield from _scales(name, getattr(parameter, "quant_state", None))
    for prefix, module in model.named_modules():
        computed = module._non_persistent_buffers_set  # noqa: SLF001 - torch has no other way to ask
        for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
            if name.rpartition(".")[2] not in computed:
                yield name, buffer
        yield from _scales(prefix, getattr(module, "state", None))


def _scales(prefix: str, state: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among a quantized weight's own figures, and, where those are quantized too, theirs."""
    for name in _SCALES:
        if isinstance(value := getattr(state, name, None), torch.Tensor):
            yield f"{prefix}.{name}", value
    if getattr(state, "nested", False):
        yield from _scales(f"{prefix}.nested", state.state2)


def _digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    for part in _plain(tensor):
        flat = part.reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), CHUNK):
            digest.update(flat[start : start + CHUNK].cpu().numpy().data)
    return digest.hexdigest()


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a tensor is made of: itself, or, of a subclass such as torchao's, those within."""
    tensor = tensor.detach()
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    elif tensor.device.type != "meta" and tensor.numel():
        yield tensor.as_subclass(torch.Tensor)
