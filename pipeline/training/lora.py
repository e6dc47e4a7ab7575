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
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from pipeline.argument_names import RESERVED_LORA
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, NonFinite, RecipeError
from pipeline.headers import read_header
from pipeline.shards import DTYPES, ShardReader
from pipeline.training.model import tied_names

ADAPTER = "default"  # PEFT's own name for the only adapter
WEIGHTS = "adapter_model.safetensors"


def base_dtype(base: Checkpoint, device: str) -> torch.dtype:
    """What the frozen weights are computed in; the adapter itself is always float32.

    On a CPU float32: without AVX512-BF16 or AMX a bf16 step of a 6.8 M Llama took 5.0 times as long (46.9 s and 9.4 s,
    2 cores). On a GPU the checkpoint's own dtype, except float16, whose gradients underflow without a loss scaler.
    """
    stored = DTYPES[next(info.dtype for info in base.tensors.values() if info.dtype in {"BF16", "F16", "F32"})]
    return torch.bfloat16 if device == "cuda" and stored == torch.bfloat16 else torch.float32


def attach(model: Any, options: Mapping[str, Any], base: Checkpoint, *, seed: int) -> PeftModel:
    """The model with a fresh adapter beside its frozen weights; the same seed gives the same adapter.

    Raise RecipeError where PEFT refuses the options, or where the adapter could not be merged afterwards.
    """
    for name in options:
        assert name not in RESERVED_LORA, f"{name}: the plan refuses it"
    tied = tied_names(model)
    set_seed(seed)
    try:
        adapted = get_peft_model(model, _plain_layers(LoraConfig(task_type="CAUSAL_LM", **options)))
    except (TypeError, ValueError, ImportError, NotImplementedError) as error:
        raise RecipeError(f"train.lora: {' '.join(str(error).split()).rstrip('.')}; correct the value") from error
    for name in touched(adapted):
        if name in tied:
            raise RecipeError(f"train.lora: {name} is tied to another tensor, so no merge can change it; leave it out")
        if name not in base.tensors:
            raise RecipeError(
                f"train.lora: {name} is not stored under that name, so no merge can change it; leave it out"
            )
    return adapted


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted model is the adapter's own, by its name."""
    return ".lora_" in name or ".modules_to_save." in name


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Write adapter_model.safetensors (float32) and adapter_config.json; the bytes depend on values alone.

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
    """Every tensor of the base that the adapter changes, merged in float32, by name and in the base's order.

    The model itself has no weights: one base tensor is in memory at a time, beside the adapter. Raise
    CheckpointError where the adapter belongs to another base, NonFinite where a merged weight is NaN or infinite.
    """
    layers = touched(_adapted_skeleton(base, adapter, trust_remote_code=trust_remote_code))
    for name in layers:
        if name not in base.tensors:
            raise CheckpointError(f"{adapter}: changes {name}, which {base.path} does not hold; it has another base")
    for name in base.tensors:
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


def _adapted_skeleton(base: Checkpoint, adapter: Path, *, trust_remote_code: bool) -> PeftModel:
    """The base without its weights, the adapter's in place, on the CPU."""
    config = AutoConfig.from_pretrained(base.path, trust_remote_code=trust_remote_code, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
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
