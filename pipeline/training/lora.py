"""LoRA: small trained matrices beside frozen weights (PEFT), and how they are folded back in.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; the arithmetic is PEFT's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Embedding, Linear
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import save_file
from transformers import AutoConfig, set_seed

from pipeline.argument_names import RESERVED_LORA
from pipeline.catalog import format_of
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, NonFinite, RecipeError
from pipeline.headers import read_header
from pipeline.shards import ShardReader
from pipeline.sizes import dense_sizes, packed_modules
from pipeline.training.model import Loaded, head_names, tied_names
from pipeline.training.task import Task

ADAPTER = "default"  # PEFT's own name for the only adapter
WEIGHTS = "adapter_model.safetensors"


def attach(
    loaded: Loaded, options: Mapping[str, Any], base: Checkpoint, *, seed: int
) -> tuple[PeftModel, frozenset[str]]:
    """The model with a fresh adapter beside its frozen weights, and the names of what trains.

    The base may be quantized. The same seed gives the same adapter. Raise RecipeError where PEFT refuses the options,
    or where the adapter could not be merged afterwards.
    """
    for name in options:
        assert name not in RESERVED_LORA, f"{name}: the plan refuses it"
    model, tied = loaded.model, tied_names(loaded.model)
    stored = dense_sizes(base, format_of(base.quantization)).shapes.keys()
    set_seed(seed)
    try:
        config = LoraConfig(task_type=loaded.task.peft_type, **_targets(loaded, options, base))
        # A quantized base's layers are known to PEFT alone.
        adapted = get_peft_model(model, config if base.quantization else _plain_layers(config))
    except (TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise RecipeError(f"train.lora: {' '.join(str(error).split()).rstrip('.')}; correct the value") from error
    for name in touched(adapted):
        if name in tied:
            raise RecipeError(f"train.lora: {name} is tied to another tensor, so no merge can change it; leave it out")
        if name not in stored and name not in loaded.new:
            raise RecipeError(
                f"train.lora: {name} is not stored under that name, so no merge can change it; leave it out"
            )
    return adapted, frozenset(_own(adapted))


def _own(model: PeftModel) -> Iterator[str]:
    """The adapter's parameters and the copies of whole modules that train beside it."""
    for name, _ in model.named_parameters():
        if ".lora_" in name or ".modules_to_save." in name:
            yield name


def _targets(loaded: Loaded, options: Mapping[str, Any], base: Checkpoint) -> dict[str, Any]:
    """The options, with what PEFT leaves out: packed layers among all-linear, and the whole head of a classifier."""
    found = dict(options)
    if base.quantization is not None and found.get("target_modules") == "all-linear":
        # PEFT means subclasses of torch's Linear, which GPTQ's and AWQ's are not.
        packed = packed_modules(base, format_of(base.quantization))
        found["target_modules"] = sorted({name.rpartition(".")[2] for name in packed})
    if not loaded.task.language:
        head = {name.rpartition(".")[0] for name in head_names(loaded.model, loaded.new)}
        found["modules_to_save"] = sorted({*(found.get("modules_to_save") or ()), *head})
    return found


def new_shapes(base: Checkpoint, adapter: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor that the adapter brings whole and the base lacks, a new head's → its dtype and shape, sorted by name."""
    whole = read_header(adapter / WEIGHTS)
    names = {name.removeprefix("base_model.model."): info for name, info in whole.items() if ".lora_" not in name}
    return {name: ("F32", info.shape) for name, info in sorted(names.items()) if name not in base.tensors}


def write_adapter(model: PeftModel, task: Task, folder: Path) -> None:
    """Write adapter_model.safetensors (float32), adapter_config.json and a classifier's task, by values alone.

    PEFT's own save_pretrained would name the base's path and list the target modules in an order that changes from run
    to run, and with them the digest.
    """
    # "auto" would look up the base's path; embeddings are never resized here.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[ADAPTER].to_dict() | {"inference_mode": True, "base_model_name_or_path": None}
    plain = {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in config.items()}
    text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    task.write(folder)


def touched(model: PeftModel) -> dict[str, Any]:
    """Tensor of the base → the PEFT layer that changes it or the weight that takes its place (`modules_to_save`)."""
    found: dict[str, Any] = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            found[f"{name}.weight"] = module
        elif isinstance(module, ModulesToSaveWrapper):
            found |= {f"{name}.{part}": weight for part, weight in module.modules_to_save[ADAPTER].named_parameters()}
    return found


def merged(
    base: Checkpoint, adapter: Path, reader: ShardReader, *, trust_remote_code: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that the adapter changes, merged in float32, by name, in the base's order; then a new head's.

    The model itself has no weights: one base tensor is in memory at a time, beside the adapter. Raise
    CheckpointError where the adapter belongs to another base, NonFinite where a merged weight is NaN or infinite.
    """
    task = Task.read(adapter)
    layers = touched(_adapted_skeleton(base, adapter, task, trust_remote_code=trust_remote_code))
    new = [name for name in layers if name not in base.tensors]
    if task.language and new:
        raise CheckpointError(f"{adapter}: changes {new[0]}, which {base.path} does not hold; it has another base")
    for name in (*base.tensors, *new):
        if name in layers:
            tensor = _merge_one(layers[name], name, reader)
            if not torch.isfinite(tensor).all():
                raise NonFinite(
                    f"merge: {name} holds NaN or infinity; lower train.arguments.learning_rate and train again"
                )
            yield name, tensor


def _merge_one(layer: Any, name: str, reader: ShardReader) -> torch.Tensor:
    if isinstance(layer, torch.nn.Parameter):
        return layer.detach()
    module = layer.get_base_layer()
    empty = module.weight
    module.weight = torch.nn.Parameter(reader[name].to(torch.float32), requires_grad=False)
    layer.merge(adapter_names=[ADAPTER])
    result: torch.Tensor = module.weight.detach()
    module.weight = empty
    return result


def _adapted_skeleton(base: Checkpoint, adapter: Path, task: Task, *, trust_remote_code: bool) -> PeftModel:
    """The base without its weights, the adapter's in place, on the CPU."""
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=trust_remote_code, local_files_only=True)
    task.describe(config)
    with torch.device("meta"):
        model = task.model_class.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            # One zero, seen at every place. PEFT moves an adapter to its base's device, and a delta on the meta device
            # added to a weight in memory changes nothing, without an error.
            setattr(module, name, torch.nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    options = _plain_layers(LoraConfig.from_pretrained(adapter))
    try:
        adapted = PeftModel.from_pretrained(model, adapter, config=options, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{adapter}: does not fit {base.path} ({said}); it has another base") from error
    # PEFT passes over what it finds no place for, and makes up what it does not find.
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if odd := sorted(wanted ^ read_header(adapter / WEIGHTS).keys()):
        raise CheckpointError(f"{adapter}: does not fit {base.path}, such as at {odd[0]}; it has another base")
    return adapted


def _plain_layers(config: LoraConfig) -> LoraConfig:
    """The config, told that dense layers are dense.

    Otherwise PEFT asks every quantization library that is installed whether a layer is one of its own, and so imports
    gptqmodel, which takes seconds, prints a banner and patches transformers.
    """
    # Private by its underscore, documented in PEFT's guide to custom models.
    config._register_custom_module({torch.nn.Linear: Linear, torch.nn.Embedding: Embedding})  # noqa: SLF001
    return config
