"""`bits: auto`: every module rounded at each number of bits, and the best mix within a budget chosen at the end."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.bit_budget import Choice, allocate, allowed_bytes, kept_bits, packed_bytes
from pipeline.checkpoint import Checkpoint
from pipeline.errors import about
from pipeline.quantization.calibration import Passed
from pipeline.quantization.folder import Order
from pipeline.quantization.gptq import round_each, trace_error
from pipeline.quantization.grid_choice import apart
from pipeline.quantization.layouts import gptq_config, gptq_layout
from pipeline.quantization.rounders import module_of, packed, weight_of
from pipeline.quantization.streamed import Streamed
from pipeline.targets import GPTQTarget, is_mixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A layer's modules in one number of bits: the packed tensors, and what each module's rounding costs."""

    bits: int
    tensors: Mapping[str, Tensor]
    errors: Mapping[str, float]


class MixedGPTQ:
    """GPTQ at several numbers of bits, which share the factor of each Gram matrix."""

    def __init__(self, order: Order, streamed: Streamed) -> None:
        assert is_mixed(order.target)
        self.target: GPTQTarget = order.target
        self._order, self._streamed = order, streamed

    def candidates(self, passed: Passed) -> list[Candidate]:
        """The layer's modules that are not kept, in each number of bits.

        A module's error is tr(ΔW H ΔWᵀ), as it is. On the example model at 4.25 bits, groups of 128, two draws of rows:
        plain 4 bits diverge by 0.0053 and 0.0054 nats, a mix by this error by 0.0049 and 0.0049, by the share of
        tr(W H Wᵀ) by 0.0050 and 0.0052, by that times the weights 0.0051 and 0.0053. At 5 bits the last is as good as
        this one, at 3.5 both others are better by 2 to 9 %. 2 bits as a fourth choice helped at 3.5 alone.
        """
        targets = [self.target.at(bits) for bits in self.target.candidates]
        tensors: dict[int, dict[str, Tensor]] = {target.code_bits: {} for target in targets}
        errors: dict[int, dict[str, float]] = {target.code_bits: {} for target in targets}
        for together, gram in passed.grams.items():
            stored = {name: module_of(self._streamed, passed, name) for name in together}
            weights = {name: weight_of(passed, name) for name in together if stored[name] not in self._order.kept}
            if not weights:
                continue
            with about(f"{passed.name}.{next(iter(weights))}"):
                several = round_each(torch.cat([*weights.values()]), gram, targets=targets)
                for target, rounded in zip(targets, several, strict=True):
                    found = apart(weights, rounded)
                    tensors[rounded.bits] |= packed(self._streamed, passed, found, gptq_layout(target))
                    for name, one in found.items():
                        errors[rounded.bits][stored[name]] = trace_error(one.dense().sub_(weights[name]), gram)
        return [Candidate(bits=bits, tensors=tensors[bits], errors=errors[bits]) for bits in tensors]

    def choose(self, parent: Checkpoint, paths: Iterable[Path]) -> dict[str, int]:
        """Module → its bits, for those of the candidates in `paths` and, as they are, those that are kept."""
        choices: dict[str, list[Choice]] = {}
        for path in paths:
            bits, errors = _said(path)
            for module, error in errors.items():
                nbytes = self._bytes(parent, module, bits)
                choices.setdefault(module, []).append(Choice(bits=bits, nbytes=nbytes, error=error))
        kept = kept_bits(self._order.kept)
        weights = sum(math.prod(parent.tensors[f"{module}.weight"].shape) for module in (*choices, *kept))
        taken = sum(self._bytes(parent, module, bits) for module, bits in kept.items())
        return allocate(choices, allowed_bytes(self.target, weights) - taken) | kept

    def _bytes(self, parent: Checkpoint, module: str, bits: int) -> int:
        outputs, inputs = parent.tensors[f"{module}.weight"].shape
        return packed_bytes((outputs, inputs), bits=bits, group_size=self.target.group_size)


def mixed_config(target: GPTQTarget, bits: Mapping[str, int]) -> dict[str, Any]:
    """The quantization_config: the most frequent bits, and in `dynamic` the modules that have others.

    gptqmodel takes the first pattern that matches a module's name from its start, and looks whole names up at once
    where each pattern is one between ^ and $ (quantization/config.py, `_extract_literal_regex_pattern`).
    """
    counts = Counter(bits.values())
    usual = max(sorted(counts), key=counts.__getitem__)
    others = {f"+:^{re.escape(module)}$": {"bits": own} for module, own in sorted(bits.items()) if own != usual}
    return gptq_config(target.at(usual)) | ({"dynamic": others} if others else {})


def mix(target: GPTQTarget, bits: Mapping[str, int], packed_bits_per_weight: float) -> str:
    """What to tell of a mix."""
    counts = sorted(Counter(bits.values()).items())
    (first, count), rest = counts[0], counts[1:]
    mixed = ", ".join([f"{count} modules in {first} bits", *(f"{count} in {own}" for own, count in rest)])
    return f"{target.variant}: {mixed}; {packed_bits_per_weight:.2f} of {target.bits_per_weight} bits per weight"


def said_of(candidate: Candidate) -> dict[str, str]:
    """What goes with a candidate's file."""
    return {"candidate": json.dumps({"bits": candidate.bits, "errors": candidate.errors})}


def chosen_in(path: Path, bits: Mapping[str, int]) -> frozenset[str]:
    """The modules that have the bits of the candidate in `path`."""
    own, errors = _said(path)
    return frozenset(module for module in errors if bits[module] == own)


def _said(path: Path) -> tuple[int, dict[str, float]]:
    """The bits of a candidate, and module → what they cost."""
    with safe_open(path, framework="pt") as file:
        said = json.loads(file.metadata()["candidate"])
    return int(said["bits"]), said["errors"]
