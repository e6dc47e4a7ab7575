"""GPTQ and AWQ, written by gptqmodel. Importing it changes transformers, so `write` runs in a process of its own.

Two things of gptqmodel 7.6 are set right here. Its AWQ is symmetric unless told otherwise. And on a CPU it multiplies
in the checkpoint's bfloat16, which a processor without AVX512-BF16 only emulates, at a sixth of float32's speed. GPTQ
therefore runs in float32. AWQ must not: its scale search keeps the weights to go back to with `.to(torch.float32)`,
which copies nothing where they are float32 already, and every scale it tries then stays in them (perplexity 73 became
102). There the layers alone compute in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from pipeline import progress
from pipeline.checkpoint import Checkpoint
from pipeline.errors import StageFailed
from pipeline.model_class import class_of
from pipeline.quantization.folder import Order, Written, scan, write_folder
from pipeline.quantization.heads import is_classifier, kept_dense
from pipeline.targets import AWQTarget, GPTQTarget

# What loaders read. The rest of gptqmodel's config (`meta`: paths, timings, device strategies) says how, not what.
CONFIG_KEYS = ("bits", "group_size", "sym", "desc_act", "lm_head", "quant_method", "format", "checkpoint_format",
               "pack_dtype", "zero_point", "version")  # fmt: skip


def write(order: Order) -> Written:
    """Quantize `order.dense` to GPTQ (v1 layout) or AWQ (GEMM layout) and write `order.out`.

    The same order gives the same bytes on the same kind of device. Source of the algorithms: arXiv 2210.17323 and
    2306.00978, as gptqmodel implements them.
    """
    assert isinstance(order.target, GPTQTarget | AWQTarget)
    assert order.calibration, "GPTQ and AWQ are calibrated"
    parent = order.clear()
    scan(parent)
    head = kept_dense(parent, trust_remote_code=order.trust_remote_code)
    with contextlib.chdir(order.scratch):  # it writes logs into the current folder
        raw = _quantize(order, parent, order.target)
    made = Checkpoint.open(order.scratch / "made")
    kept = {key: raw[key] for key in CONFIG_KEYS if key in raw}
    kept["meta"] = {"quantizer": raw["meta"]["quantizer"]}
    awq = isinstance(order.target, AWQTarget)
    if awq and head:  # transformers makes every other linear layer of the model an AWQ layer
        kept["modules_to_not_convert"] = head
    return write_folder(order, parent, made, quantization=kept, scaled=awq)


def _quantize(order: Order, parent: Checkpoint, target: GPTQTarget | AWQTarget) -> Mapping[str, Any]:
    """Let gptqmodel write `scratch/made`; return the quantization_config that it wrote."""
    import torch
    import transformers
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.models.auto import check_and_get_model_definition

    transformers.set_seed(order.seed)
    cuda = torch.cuda.is_available()
    awq = isinstance(target, AWQTarget)
    if awq and not cuda:
        _multiply_in_float32(torch.nn)
    model_class = class_of(parent.config, trust_remote_code=order.trust_remote_code)
    if is_classifier(model_class):
        # It would load a causal language model, whose output head is random and in the way of the classifier's.
        definition = check_and_get_model_definition(str(order.dense), trust_remote_code=order.trust_remote_code)
        definition.loader = model_class
    model = GPTQModel.load(
        str(order.dense),
        _config(target, "cuda:0" if cuda else "cpu"),
        trust_remote_code=order.trust_remote_code,
        dtype=_dtype(parent) if cuda or awq else torch.float32,
    )
    model.layer_callback = _Layers(target.variant, int(parent.config.get("num_hidden_layers", 0)))
    rows = [{"input_ids": list(ids), "attention_mask": [1] * len(ids)} for ids in order.calibration]
    # Left to itself it chooses an AWQ kernel that only CUDA has.
    model.quantize(rows, backend=BACKEND.AWQ_TORCH if awq and not cuda else BACKEND.AUTO, batch_size=1)
    made = order.scratch / "made"
    model.save_quantized(str(made))
    raw = Checkpoint.open(made).config.get("quantization_config")
    if not isinstance(raw, dict):
        raise StageFailed(f"{target.variant}: gptqmodel wrote no quantization_config; report this with its version")
    return raw


def _config(target: GPTQTarget | AWQTarget, device: str) -> Any:
    from gptqmodel.quantization import AWQConfig, GPTQConfig

    if isinstance(target, AWQTarget):
        return AWQConfig(
            bits=target.bits, group_size=target.group_size, sym=False, device=device, offload_to_disk=False
        )
    return GPTQConfig(
        bits=target.bits,
        group_size=target.group_size,
        sym=target.symmetric,
        desc_act=target.desc_act,
        device=device,
        offload_to_disk=False,
    )


def _dtype(parent: Checkpoint) -> Any:
    """The parent's own 16-bit type, or bfloat16: the packing classes take no float32."""
    import torch

    named = parent.config.get("dtype", parent.config.get("torch_dtype"))  # the older name
    return torch.float16 if named == "float16" else torch.bfloat16


def _multiply_in_float32(nn: Any) -> None:
    """Let every linear layer of this process cast, multiply in float32 and cast back."""

    def forward(layer: Any, values: Any) -> Any:
        bias = None if layer.bias is None else layer.bias.float()
        return nn.functional.linear(values.float(), layer.weight.float(), bias).to(values.dtype)

    nn.Linear.forward = forward


class _Layers:
    """gptqmodel's callback after each decoder layer, as progress."""

    def __init__(self, variant: str, total: int) -> None:
        self._unit, self._total = f"{variant} layers", total

    def layer_complete(self, *, layer_idx: int, submodule_finalized: bool) -> None:
        """Say that a layer is quantized; it is called a second time once that is packed."""
        if not submodule_finalized:
            progress.step("quantize", done=layer_idx + 1, total=max(self._total, layer_idx + 1), unit=self._unit)
