"""How the weights of a checkpoint are quantized, as its config says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How a checkpoint's weights are quantized, from its config.

    `bits` and `group_size` are what most modules have (-1: a whole channel; bitsandbytes: the block size).
    `raw` is the config's own dictionary, for what only one format knows; `metadata` is what the shards' headers say of
    single tensors, for torchao alone.
    """

    method: str
    bits: int
    group_size: int
    symmetric: bool
    ignored: tuple[str, ...]
    raw: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        """What the method's own config calls the way its codes lie, where it says.

        gptqmodel calls AWQ's `version` `checkpoint_format` or `format`; `backend` llm-awq wins, as in transformers.
        """
        match self.method:
            case "awq" if self.raw.get("backend") == "llm-awq":
                return "llm-awq"
            case "awq":
                named = (self.raw.get(key) for key in ("version", "checkpoint_format", "format"))
                return str(next((name for name in named if name), "gemm")).lower()
            case "compressed-tensors":
                return str(self.raw.get("format") or "fakequant")
            case "modelopt":
                return str(self.raw.get("quant_algo")).lower()
        return ""

    @property
    def mixed(self) -> bool:
        """Whether single modules have bits or groups of their own by gptqmodel's `dynamic`.

        optimum 2.3, with which transformers loads GPTQ, makes every layer by the bits of the whole.
        """
        dynamic = self.raw.get("dynamic") if self.method == "gptq" else None
        return isinstance(dynamic, dict) and any(
            values for pattern, values in dynamic.items() if not str(pattern).startswith("-:")
        )

    @staticmethod
    def parse(raw: Mapping[str, Any]) -> Quantization:
        """Read a `quantization_config`; raise CheckpointError if it does not say its method and bits."""
        method = str(
            raw.get("quant_method") or ("bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & raw.keys() else "")
        )
        try:
            if method == "bitsandbytes":
                four = bool(raw.get("load_in_4bit") or raw.get("_load_in_4bit"))
                bits, group_size, symmetric = (4, 64, True) if four else (8, -1, True)
                ignored = raw.get("llm_int8_skip_modules")
            elif method == "awq":
                bits = int(raw.get("bits", raw.get("w_bit", 4)))
                group_size = int(raw.get("group_size", raw.get("q_group_size", 128)))
                symmetric, ignored = not raw.get("zero_point", True), raw.get("modules_to_not_convert")
            elif method == "hqq":  # each module says its own: these are what the config gives all
                own = (raw.get("quant_config") or {}).get("weight_quant_params") or {}
                bits, group_size = int(own.get("nbits") or 0), int(own.get("group_size") or -1)
                symmetric, ignored = False, raw.get("skip_modules")
            else:
                bits, group_size = int(raw.get("bits", 0)), int(raw.get("group_size", -1))
                symmetric, ignored = bool(raw.get("sym", True)), raw.get("modules_to_not_convert", raw.get("ignore"))
            names = tuple(str(name) for name in ignored or ())
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"config.json: quantization_config of {method} has an unreadable value ({error})"
            ) from error
        if not method:
            raise CheckpointError("config.json: quantization_config names no quant_method; add it, such as gptq or awq")
        return Quantization(
            method=method, bits=bits, group_size=group_size, symmetric=symmetric, ignored=names, raw=dict(raw)
        )
