"""How compressed-tensors' config says that each module is quantized.

`config_groups` maps names to schemes: `targets`, `weights` and, where layouts are mixed, `format` (compressed-tensors,
quantization/quant_config.py, quant_scheme.py, quant_args.py). A target is a module's name, `re:` before a pattern that
matches its name from the start, or the name of its class; names come before patterns, these before classes, and in
alphabetical order within each (utils/match.py `match_targets`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.catalog import FORMATS
from pipeline.errors import CheckpointError, UnsupportedFormat
from pipeline.formats.components import matches
from pipeline.quantization_config import Quantization

INT_BITS = range(2, 9)
FLOAT_BITS = (4, 6, 8)
LAYOUTS = FORMATS["compressed-tensors"].layouts
# Folded into the weights when the model was made, so that the weights as they are compute what the model does.
FOLDED = ("weight_input", "weight_output")
PATTERN = "re:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one module's weight is quantized: `kind` int or float; `block` = the (height, width) that share a scale.

    A side of 0 is as long as the weight's.
    """

    kind: str
    bits: int
    symmetric: bool
    strategy: str
    block: tuple[int, int]

    def tile(self, outputs: int, inputs: int) -> tuple[int, int]:
        """`block` within a weight [outputs, inputs]."""
        return self.block[0] or outputs, self.block[1] or inputs


def check_model(quantization: Quantization) -> None:
    """Raise UnsupportedFormat, with the tool that can, for what no module of which can be read."""
    raw = quantization.raw
    _check_format(raw.get("format") or "fakequant")
    sparsity = raw.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        _check_format(sparsity["format"])
    for name, location in _online(raw.get("transform_config") or {}):
        raise UnsupportedFormat(
            f"compressed-tensors: transform {name} changes activations while the model runs ({location}), which dense "
            "weights cannot; run it with vllm, or quantize the original without it"
        )


def _online(config: Any) -> Iterator[tuple[str, str]]:
    """The transforms that are not folded into weights, each with where it applies."""
    try:
        for name, scheme in (config.get("config_groups") or {}).items():
            for arguments in scheme.get("apply") or ():
                if arguments["location"] not in FOLDED:
                    yield str(name), str(arguments["location"])
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"config.json: quantization_config.transform_config cannot be read ({error!r}); download it again"
        ) from error


def scheme_of(module: str, quantization: Quantization) -> Scheme:
    """The scheme of one packed module; raise an InputError where the config has none for it, or none that can be."""
    groups = _groups(quantization)
    ignored = quantization.raw.get("ignore") or []
    if not isinstance(ignored, list):
        raise CheckpointError(
            f"config.json: quantization_config.ignore is {type(ignored).__name__}, expected a list of names; fix it"
        )
    if _by_name(module, map(str, ignored), key="ignore") is not None:
        raise CheckpointError(f"{module}: is packed, but quantization_config.ignore says it is dense; fix config.json")
    target = _by_name(module, groups, key="targets") or _by_class(module, groups)
    group = groups[target]
    _check_format(group.get("format") or "fakequant")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise CheckpointError(
            f"{module}: is packed, but its scheme in quantization_config.config_groups has no weights; fix config.json"
        )
    return _parse(module, weights)


def activations(quantization: Quantization) -> str:
    """What the model rounds its layers' inputs to, as in `catalog.Format.activations`; the coarsest of several.

    A scale that all of a layer's inputs share is told by "by tensor" after it; "even" is the library's grid of a token,
    whose ends lie half a step beyond its codes (quantization/utils/helpers.py, `calculate_qparams`).
    """
    found = []
    for group in _groups(quantization).values():
        given = group.get("input_activations")
        if isinstance(given, dict):
            bits, kind = given.get("num_bits") or 8, str(given.get("type") or "int").lower()
            by_tensor = given.get("strategy") == "tensor" and not given.get("dynamic")
            how = " by tensor" if by_tensor else " even" if kind == "int" else ""
            found.append((bits, not by_tensor, f"{kind}{bits}{how}"))
    return min(found)[2] if found else ""


def _groups(quantization: Quantization) -> dict[str, dict[str, Any]]:
    """Target → its scheme; of two for one target the last counts."""
    groups = quantization.raw.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError(
            "config.json: quantization_config.config_groups holds no schemes, expected an object of targets and "
            "weights for each; download it again"
        )
    targets = [(group.get("targets") or [], group) for group in groups.values()]
    if not all(isinstance(names, list) for names, _ in targets):
        raise CheckpointError(
            "config.json: quantization_config.config_groups has targets that are no list; download it again"
        )
    return {str(target): group for names, group in targets for target in names}


def _by_name(module: str, targets: Iterable[str], *, key: str) -> str | None:
    """The first target that names the module, itself before patterns."""
    targets = set(targets)
    if module in targets:
        return module
    patterns = sorted(target for target in targets if target.startswith(PATTERN))
    return next((target for target in patterns if matches(target.removeprefix(PATTERN), module, key=key)), None)


def _by_class(module: str, groups: Mapping[str, dict[str, Any]]) -> str:
    """The target that is the module's class: without the model, told from the module's name."""
    last = module.rpartition(".")[2]
    embedding = "embed" in last or last in {"wte", "wpe"}
    wanted = "Embedding" if embedding else "Linear"
    if wanted in groups:
        return wanted
    classes = [target for target in groups if target.isidentifier() and target[0].isupper()]
    if embedding and "Linear" in classes:
        classes.remove("Linear")
    # Names in the file may be others than the model's own; where all modules have one scheme, it does not matter.
    left = classes or list(groups)
    if not left or any(groups[target] != groups[left[0]] for target in left):
        raise CheckpointError(
            f"{module}: is packed, but no target of quantization_config.config_groups is this module; fix config.json"
        )
    return left[0]


def _parse(module: str, weights: Mapping[str, Any]) -> Scheme:
    try:
        kind, bits = str(weights.get("type") or "int").lower(), int(weights.get("num_bits", 8))
        size = weights.get("group_size")
        inferred = "tensor" if size is None else "channel" if int(size) == -1 else "group"
        strategy = str(weights.get("strategy") or inferred).lower()
        block = _block(strategy, weights)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{module}: its scheme in quantization_config.config_groups has an unreadable value ({error}); "
            "fix config.json"
        ) from error
    if kind not in {"int", "float"} or bits not in (INT_BITS if kind == "int" else FLOAT_BITS):
        raise UnsupportedFormat(
            f"{module}: compressed-tensors with {kind} weights of {bits} bits cannot be read, only int of 2 to 8 bits "
            "and float of 4, 6 and 8"
        )
    if block is None or min(block) < 0:
        raise UnsupportedFormat(
            f"{module}: compressed-tensors strategy {strategy} with group size {size} cannot be read, only tensor, "
            "channel, block, and group and tensor_group of a positive size"
        )
    symmetric = bool(weights.get("symmetric", True))
    return Scheme(kind=kind, bits=bits, symmetric=symmetric, strategy=strategy, block=block)


def _block(strategy: str, weights: Mapping[str, Any]) -> tuple[int, int] | None:
    match strategy:
        case "tensor":
            return 0, 0
        case "channel":
            return 1, 0
        case "group" | "tensor_group":
            return 1, int(weights.get("group_size") or 0) or -1
        case "block":
            structure = weights.get("block_structure")
            height, width = structure.split("x") if isinstance(structure, str) else structure or (0, 0)
            return int(height) or -1, int(width) or -1
    return None


def _check_format(name: Any) -> None:
    if name not in LAYOUTS:
        raise UnsupportedFormat(
            f"compressed-tensors in layout {name} cannot be read, only {', '.join(LAYOUTS)}; "
            f"{FORMATS['compressed-tensors'].otherwise}"
        )
