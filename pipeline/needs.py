"""What training and quantizing will ask of the machine, estimated from a recipe and the shapes of the dense weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from pipeline.kept import layer_of
from pipeline.recipe import Recipe
from pipeline.sizes import Sizes
from pipeline.steps import Needs
from pipeline.targets import GGUFTarget, Target, is_mixed, is_own

RUNTIME_BYTES = 600 * 10**6  # a process with torch and transformers imported
ACTIVATIONS = 4 << 30  # bytes of calibration activations in memory, at most


def training_needs(recipe: Recipe, sizes: Sizes) -> Needs:
    """Resume files and the result; weights, gradients and two moments."""
    train, weights = recipe.train, 4 * sizes.parameters  # float32 on a CPU; half of it on a GPU
    if train.method == "lora":
        adapter = sizes.adapter_bytes(int(train.lora.get("r", 8)))
        return Needs(disk=7 * adapter, memory=RUNTIME_BYTES + weights + 4 * adapter)
    if train.method in {"head", "projector"}:
        return Needs(disk=10**8, memory=RUNTIME_BYTES + weights)
    dense = sizes.dense_bytes(recipe.upcast.dtype)
    return Needs(disk=6 * weights + dense, memory=RUNTIME_BYTES + 4 * weights)


def quantizing_disk(sizes: Sizes, target: Target, dtype: str) -> int:
    """Bytes of an artifact, and of the files that it is made from: what was packed, with `bits: auto` at every bits."""
    if is_mixed(target):
        packed = sum(sizes.quantized_bytes(target.at(bits), dtype) for bits in target.candidates)
    else:
        packed = sizes.quantized_bytes(target, dtype)
    return sizes.quantized_bytes(target, dtype) + packed


def quantizing_memory(recipe: Recipe, sizes: Sizes, targets: Sequence[Target]) -> int:
    """Bytes beside the imports, for writing the targets or for reloading them one by one, whichever is more."""
    dtype = recipe.upcast.dtype
    # Whole, or layer by layer in float32 beside what lies outside of the layers, when it is compared with its weights.
    outside = sum(math.prod(shape) for name, shape in sizes.shapes.items() if layer_of(name) is None)
    reloaded = max((_loaded(sizes, target, dtype) for target in targets), default=0)
    compared = 4 * outside + 2 * 4 * max(_layers(sizes).values())
    return max(_writing_memory(recipe, sizes, targets), reloaded, compared)


def _loaded(sizes: Sizes, target: Target, dtype: str) -> int:
    """Bytes of a target's model once it is loaded: transformers dequantizes a GGUF file."""
    return sizes.dense_bytes("float32") if isinstance(target, GGUFTarget) else sizes.quantized_bytes(target, dtype)


def _writing_memory(recipe: Recipe, sizes: Sizes, targets: Sequence[Target]) -> int:
    """A whole model in a library; or a layer in float32, with Gram matrices and activations; or the largest tensor."""
    calibrated = [target for target in targets if target.calibrated]
    if not all(map(is_own, calibrated)):
        return 2 * sizes.dense_bytes(recipe.upcast.dtype)
    if not calibrated:
        return 4 * (3 * max(_layers(sizes).values()) if any(map(is_own, targets)) else sizes.largest)
    widths = [inputs for _, inputs in sizes.linears.values()] or [0]
    rows = recipe.calibration.samples * recipe.calibration.sequence_length
    activations = min(2 * 4 * rows * min(widths), ACTIVATIONS)
    return 3 * 4 * max(_layers(sizes).values()) + 4 * 4 * max(widths) ** 2 + activations


def _layers(sizes: Sizes) -> Counter[str | None]:
    """Layer → its linear weights; what lies outside counts as the largest tensor at least."""
    layers: Counter[str | None] = Counter({None: sizes.largest})
    for name, (outputs, inputs) in sizes.linears.items():
        layers[layer_of(name)] += outputs * inputs
    return layers
