"""A model whose layers are in memory only while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.checkpoint import Checkpoint
from pipeline.errors import MissingTensor, UnsupportedFormat
from pipeline.skeleton import hollow, skeleton_of

Read = Callable[[str], Tensor]

_MAPPED = 1 << 24  # elements from which an embedding stays in its file: of its rows few are looked up at a time


class Streamed:
    """The architecture of a checkpoint with real buffers, its weights read by `read` (a stored tensor by its name).

    `stored` maps each parameter to the name that it is read by; left out, to its tensor in a dense checkpoint.
    `layers` maps the name of each layer, the items of the model's outermost lists of modules that hold linear layers,
    to its module. All else is loaded at once, in float32; large embeddings stay in their file, in the dtype that they
    have there, and give float32. Raise UnsupportedFormat where a parameter is not stored as one tensor.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        read: Read,
        *,
        device: torch.device,
        trust_remote_code: bool = False,
        stored: Mapping[str, str] | None = None,
    ) -> None:
        self._read, self.device = read, device
        self._stored = _stored(checkpoint, trust_remote_code=trust_remote_code) if stored is None else stored
        self.model: Any = hollow(checkpoint.folder, trust_remote_code=trust_remote_code).eval()
        for module in self.model.modules():  # a cache of keys and values would grow whenever a layer runs again
            if hasattr(getattr(module, "config", None), "use_cache"):
                module.config.use_cache = False
        self.layers = layers_of(self.model)
        self._inside = {
            f"{name}.{parameter}" for name, layer in self.layers.items() for parameter, _ in layer.named_parameters()
        }
        self._load_outside()

    def stored(self, parameter: str) -> str:
        """The checkpoint's name of a parameter; raise MissingTensor where it has none."""
        if parameter not in self._stored:
            raise MissingTensor(f"{parameter}: is in no shard; the checkpoint is incomplete, download it again")
        return self._stored[parameter]

    @contextmanager
    def loaded(self, layer: str) -> Iterator[nn.Module]:
        """The layer with its weights in float32, gone again after the block."""
        module = self.layers[layer]
        for name, _ in list(module.named_parameters()):
            # A copy: some tensors are the file itself, mapped into memory.
            _put(module, name, self._tensor(f"{layer}.{name}").to(torch.float32, copy=True))
        try:
            yield module
        finally:
            for name, parameter in list(module.named_parameters()):
                _put(module, name, torch.empty_like(parameter, device="meta"))

    def _tensor(self, parameter: str) -> Tensor:
        return self._read(self.stored(parameter)).to(self.device)

    def _load_outside(self) -> None:
        embeddings = {f"{name}.weight": module for name, module in self.model.named_modules()
                      if isinstance(module, nn.Embedding)}  # fmt: skip
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        for name, parameter in list(self.model.named_parameters()):
            if name in self._inside or name in tied:
                continue
            tensor = self._tensor(name)
            if name in embeddings and tensor.numel() >= _MAPPED:
                embeddings[name].register_forward_hook(lambda _module, _given, found: found.float())
            elif parameter.numel() < _MAPPED:
                tensor = tensor.float()
            _put(self.model, name, tensor)
        for name, buffer in list(self.model.named_buffers()):
            if name in self._stored:
                buffer.copy_(self._read(self._stored[name]))
        self.model.tie_weights()


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module of each item of the outermost module lists that hold linear layers, in the model's order."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{layer}.") for layer in found)
        if isinstance(module, nn.ModuleList) and not inside:
            found |= {f"{name}.{key}": item for key, item in module.named_children() if linears_of(item)}
    return found


def linears_of(layer: nn.Module) -> dict[str, nn.Linear]:
    """Name → each linear module of a layer."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def _stored(checkpoint: Checkpoint, *, trust_remote_code: bool) -> dict[str, str]:
    """Parameter or buffer of the model → the tensor that is stored for it."""
    skeleton = skeleton_of(
        checkpoint.folder, dtype=torch.float32, trust_remote_code=trust_remote_code, stored=len(checkpoint.tensors)
    )
    found: dict[str, str] = {}
    for name, info in checkpoint.tensors.items():
        place = skeleton.place(name)
        if place is None:
            continue
        expected = tuple(skeleton.parameters[place.parameter].shape)
        if place.parameter in found or tuple(info.shape) != expected:
            raise UnsupportedFormat(
                f"{place.parameter}: is stored in parts, such as {name}, which the calibration pass does not join; "
                "quantize to bitsandbytes"
            )
        found[place.parameter] = name
    return found


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter `name` of a module."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
