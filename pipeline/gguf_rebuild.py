"""config.json, generation_config.json and the tokenizer's files, made from a GGUF file's metadata by transformers."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto import modeling_auto

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, UnsupportedFormat
from pipeline.gguf_headers import read_gguf_header
from pipeline.gguf_shards import GGUFReader

_ALIGNMENT = 32


def rebuild(checkpoint: Checkpoint, folder: Path) -> None:
    """Write config.json, the tokenizer's files and, for a model that generates, generation_config.json to `folder`.

    Raise CheckpointError where transformers cannot make them from the metadata, UnsupportedFormat for positions that it
    cannot compute.
    """
    _check_blocks(checkpoint)
    with _one_file(checkpoint) as path:
        where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        try:
            config = transformers.AutoConfig.from_pretrained(path.parent, **where)
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **where)
        except Exception as error:  # metadata from outside can make transformers raise anything
            raise _unmade(checkpoint, error) from error
    try:
        _write(checkpoint, config, tokenizer, folder)
    except UnsupportedFormat:
        raise
    except Exception as error:  # as above: what it let pass, it may still not write
        raise _unmade(checkpoint, error) from error


def _check_blocks(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for a file of which transformers would list more layers than there can be."""
    assert checkpoint.quantization is not None
    for key, value in checkpoint.quantization.raw["metadata"].items():
        if key.endswith(".block_count") and isinstance(value, int) and value > len(checkpoint.tensors):
            raise CheckpointError(
                f"{checkpoint.path.name}: {key} is {value}, but it holds {len(checkpoint.tensors)} tensors; the file "
                "is damaged, download it again"
            )


def _unmade(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return CheckpointError(
        f"{checkpoint.path.name}: transformers cannot make a config and a tokenizer from its metadata "
        f"(architecture {checkpoint.model_type}: {reason}); upcast the original checkpoint instead"
    )


def _write(checkpoint: Checkpoint, config: Any, tokenizer: Any, folder: Path) -> None:
    _set_rope(checkpoint, config)
    config._name_or_path = ""  # noqa: SLF001 - general.name, and the path it was read from
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    generates = names.get(config.model_type) or modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.get(
        config.model_type
    )
    if not config.architectures and isinstance(generates, str):
        config.architectures = [generates]
    config.save_pretrained(folder)
    for circumstance in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(circumstance, None)
    tokenizer.save_pretrained(folder)
    if generates:
        transformers.GenerationConfig.from_model_config(config).save_pretrained(folder)


@contextmanager
def _one_file(checkpoint: Checkpoint) -> Iterator[Path]:
    """A GGUF file with the whole model's metadata and tensor names.

    transformers reads one file, and decides by tensor names (is there an output.weight?): for a split model that file
    is the first part's metadata and a table of all names, each for one float32.
    """
    if len(checkpoint.shards) == 1:
        yield checkpoint.path
        return
    header = read_gguf_header(checkpoint.path)
    with checkpoint.path.open("rb") as file:
        (entries,) = struct.unpack_from("<Q", file.read(24), 16)
        metadata = file.read(header.tables - 24)
    alignment = int(header.metadata.get("general.alignment", _ALIGNMENT))
    names = [name.encode() for name in checkpoint.tensors]
    table = b"".join(
        struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 1, 0, i * alignment)
        for i, name in enumerate(names)
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, len(names), entries) + metadata + table
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        path.write_bytes(head + bytes(-len(head) % alignment + len(names) * alignment))
        yield path


def _set_rope(checkpoint: Checkpoint, config: Any) -> None:
    """Set `rope_parameters` to the scaling that the file names or keeps as tensors, which transformers passes over."""
    assert checkpoint.quantization is not None
    prefix = f"{checkpoint.model_type}.rope.scaling."
    said = {
        key.removeprefix(prefix): value
        for key, value in checkpoint.quantization.raw["metadata"].items()
        if key.startswith(prefix)
    }
    text, tensors = config.get_text_config(), checkpoint.tensors
    kind, original = said.get("type", "none"), said.get("original_context_length")
    if "rope_freqs.weight" in tensors:
        _set_llama3(text, _values(checkpoint, "rope_freqs.weight"))
    elif {"rope_factors_long.weight", "rope_factors_short.weight"} <= tensors.keys():
        factors = {
            f"{which}_factor": _values(checkpoint, f"rope_factors_{which}.weight").tolist()
            for which in ("long", "short")
        }
        text.rope_parameters = {
            **text.rope_parameters, "rope_type": "longrope", **factors,
            "original_max_position_embeddings": original or text.max_position_embeddings,
        }  # fmt: skip
    elif kind in {"linear", "yarn"} and "factor" in said:
        scaling = {"rope_type": kind, "factor": said["factor"]}
        if original is not None:
            scaling["original_max_position_embeddings"] = original
        text.rope_parameters = {**text.rope_parameters, **scaling}
    elif kind != "none":
        raise UnsupportedFormat(
            f"{checkpoint.path.name}: has rope scaling {kind} that cannot be written to config.json; upcast the "
            "original checkpoint instead"
        )


def llama3_factors(config: Any) -> torch.Tensor:
    """float32 [D / 2]: what Llama 3's scaling divides each rotary frequency by, which llama.cpp keeps as a tensor."""
    theta = float(config.rope_parameters["rope_theta"])
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    factors: torch.Tensor = 1 / theta**exponents / scaled
    return factors


def _set_llama3(config: Any, factors: torch.Tensor) -> None:
    """Llama 3's scaling, if that is where the factors [D / 2] come from (llama.cpp, convert_hf_to_gguf.py)."""
    theta = float(config.rope_parameters["rope_theta"])
    llama3 = {
        "rope_theta": theta, "rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config.rope_parameters = llama3
    found = llama3_factors(config)
    if len(found) != len(factors) or not torch.allclose(found, factors, rtol=1e-4):
        raise UnsupportedFormat(
            "rope_freqs.weight: scales positions in another way than Llama 3.1 and 3.2, which config.json cannot say; "
            "upcast the original checkpoint instead"
        )


def _values(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    with GGUFReader(checkpoint) as reader:
        (tensor,) = reader.group(name).tensors.values()
        return tensor.float().clone()
