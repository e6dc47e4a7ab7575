"""A model folder or GGUF file, opened and checked once; trusted by everything below."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.companions import companions_in
from pipeline.errors import CheckpointError, CorruptShard, MissingTensor, UnexpectedTensor, UnsafePath
from pipeline.gguf_files import SUFFIX, is_gguf, open_parts, part_names
from pipeline.headers import TensorInfo, read_header, read_metadata
from pipeline.quantization_config import Quantization

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
MODELOPT = "hf_quant_config.json"  # where ModelOpt's exporter says what config.json may leave out


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder whose config parses, whose shards are whole, and whose names stay inside it; or a GGUF file.

    `path` is the folder, or the GGUF file (its first part). `weight_map` is tensor → shard file name; `tensors` is
    tensor → where it lies in that shard. A GGUF file has its own names for tensors, and metadata in place of
    config.json and a tokenizer's files: `config` is the little of it that a plan needs.
    """

    path: Path
    config: Mapping[str, Any]
    weight_map: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    quantization: Quantization | None
    companions: tuple[str, ...]

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Open and check a folder or a GGUF file; raise a CheckpointError that names what is wrong with it."""
        if is_gguf(path):
            return _open_gguf(path)
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: no such folder; name a folder with config.json and safetensors files, or a {SUFFIX} file"
            )
        config = read_json(inside(path, "config.json"))
        raw = _declared(config) or _modelopt(path)
        if raw is not None and not isinstance(raw, dict):
            raise CheckpointError(
                f"{path}/config.json: quantization_config is {type(raw).__name__}, expected an object"
            )
        weight_map, tensors = _open_shards(path)
        quantization = _quantization(path, raw, weight_map) if raw else None
        return Checkpoint(
            path=path, config=config, weight_map=weight_map, tensors=tensors, quantization=quantization,
            companions=_companions(path),
        )  # fmt: skip

    @property
    def shards(self) -> tuple[str, ...]:
        """The shard file names, each once, in weight-map order."""
        return tuple(dict.fromkeys(self.weight_map.values()))

    @property
    def is_gguf(self) -> bool:
        """Whether config.json and tokenizer files are to be rebuilt from the weights' own metadata."""
        return self.quantization is not None and self.quantization.method == "gguf"

    @property
    def folder(self) -> Path:
        """Where the shards lie."""
        return self.path.parent if self.is_gguf else self.path

    @property
    def files(self) -> tuple[str, ...]:
        """Every file of the folder that makes the checkpoint what it is."""
        if self.is_gguf:
            return self.shards
        modelopt = (MODELOPT,) if (self.path / MODELOPT).is_file() else ()
        return ("config.json", *modelopt, *self.companions, *self.shards)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.end - info.start for info in self.tensors.values())

    @property
    def model_type(self) -> str:
        """Transformers' name of the architecture."""
        return str(self.config.get("model_type", ""))


def architecture_of(config: Mapping[str, Any]) -> str:
    """The class that a config.json names first, or nothing."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def language_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the language model: its `text_config`, where it has other parts, before the rest."""
    text = config.get("text_config")
    return {**config, **(text if isinstance(text, dict) else {})}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raise CheckpointError if it is anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text: nobody could write it again
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; the folder is no Hugging Face checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__}, expected a JSON object; download it again")
    return value


def inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`; raise UnsafePath if it leads out, by its parts or through a link."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in name or "\0" in name:
        raise UnsafePath(f"{folder}: names the file {name!r}, which leaves the folder; do not use this checkpoint")
    path = folder / pure
    try:
        path.is_file()
        target = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # too long, no text, forbidden, a link to itself
        raise UnsafePath(f"{folder}: names the file {name[:200]!r}, which cannot be opened") from error
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":  # the hub's cache: a snapshot's files are links into its blobs
        roots.append(folder.parent.parent.resolve() / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise UnsafePath(f"{folder}: {name} is a link that leaves the folder; copy the file itself into it")
    return path


def _quantization(path: Path, raw: dict[str, Any], weight_map: Mapping[str, str]) -> Quantization:
    quantization = Quantization.parse(raw)
    if quantization.method != "torchao":
        return quantization
    shards = dict.fromkeys(weight_map.values())
    metadata = {name: text for shard in shards for name, text in read_metadata(inside(path, shard)).items()}
    return replace(quantization, metadata=metadata)


def _open_gguf(path: Path) -> Checkpoint:
    folder, names = (path if path.is_dir() else path.parent), part_names(path)
    model = open_parts([inside(folder, name) for name in names])
    metadata = {key: value for key, value in model.metadata.items() if not key.startswith("tokenizer.")}
    chat_template = "tokenizer.chat_template" in model.metadata
    config = {"model_type": model.architecture}
    context = metadata.get(f"{model.architecture}.context_length")
    return Checkpoint(
        path=folder / names[0],
        config=config if context is None else {**config, "max_position_embeddings": context},
        weight_map=model.weight_map,
        tensors=model.tensors,
        quantization=Quantization(
            method="gguf",
            bits=model.bits,
            group_size=model.group_size,
            symmetric=model.symmetric,
            ignored=(),
            raw={"quant_method": "gguf", "type": model.dtype, "chat_template": chat_template, "metadata": metadata},
        ),
        companions=(),
    )


def _open_shards(folder: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    named = _named_shards(folder)
    weight_map: dict[str, str] = {}
    tensors: dict[str, TensorInfo] = {}
    for shard in dict.fromkeys(named.values()) if named else [SINGLE]:
        path = inside(folder, shard)
        if not path.is_file():
            raise CorruptShard(f"{folder}: {shard} is named by {INDEX} but missing; download the checkpoint again")
        for name, info in read_header(path).items():
            if name in tensors:
                raise UnexpectedTensor(
                    f"{name}: is in both {weight_map[name]} and {shard}; download the checkpoint again"
                )
            weight_map[name], tensors[name] = shard, info
    for name, shard in named.items():
        if weight_map.get(name) != shard:
            raise MissingTensor(f"{name}: {INDEX} places it in {shard}, which does not hold it; download it again")
    return weight_map, tensors


def _named_shards(folder: Path) -> dict[str, str]:
    """The index's weight map, or nothing where a single file holds all."""
    if (folder / INDEX).exists():
        named = read_json(inside(folder, INDEX)).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()) or not named:
            raise CheckpointError(f"{folder / INDEX}: has no weight_map of tensor to file; download it again")
        return named
    if not (folder / SINGLE).exists():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"found {pickles[0]}, a pickle, which is never opened" if pickles else "found none"
        raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}, {found}; convert the weights to safetensors")
    return {}


def copy_companions(source: Path, folder: Path, *, but: frozenset[str] = frozenset()) -> None:
    """Copy what goes along with the weights of the folder `source`, `but` for some, to `folder`, byte for byte."""
    for name in (name for name in _companions(source) if name not in but):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


def _declared(config: Mapping[str, Any]) -> Any:
    """How config.json says that the weights, or those of its language model alone, are quantized."""
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    return next((part[key] for part in parts for key in QUANTIZATION_KEYS if part.get(key)), None)


def _modelopt(folder: Path) -> dict[str, Any] | None:
    """What ModelOpt's own file says as a quantization_config, or None where there is no such file."""
    if not (folder / MODELOPT).exists():
        return None
    found = read_json(inside(folder, MODELOPT)).get("quantization")
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder / MODELOPT}: has no quantization with quant_algo; download it again")
    return {"quant_method": "modelopt", "ignore": found.get("exclude_modules"), **found}


def _companions(folder: Path) -> tuple[str, ...]:
    kept = companions_in(folder, but=frozenset({INDEX, MODELOPT}))
    for name in kept:
        inside(folder, name)
    return kept
