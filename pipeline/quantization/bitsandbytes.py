"""NF4, FP4 and int8, written by transformers and bitsandbytes. The model is loaded and saved, never run.

(On processors with AVX512-BF16 a forward pass repacks 4-bit weights in place; what is saved after it is garbage.)
"""

from __future__ import annotations

from typing import Any

from pipeline import progress
from pipeline.checkpoint import Checkpoint
from pipeline.errors import StageFailed
from pipeline.model_class import class_of
from pipeline.quantization.folder import Order, Written, write_folder
from pipeline.quantization.heads import kept_dense
from pipeline.targets import BitsAndBytesTarget


def write(order: Order) -> Written:
    """Quantize `order.dense` on the CPU and write `order.out`; the same weights give the same bytes.

    4 bits: blocks of 64 weights, bfloat16 for computing. int8: one scale for each row, outlier threshold 6.0. Nothing
    is calibrated. Source: bitsandbytes 0.50 `functional.quantize_4bit` and `int8_vectorwise_quant`.
    """
    assert isinstance(order.target, BitsAndBytesTarget)
    parent = order.begin()
    unit = f"{order.target.variant} writes"
    progress.step("quantize", done=0, total=2, unit=unit)
    raw = _quantize(order, parent, order.target)
    progress.step("quantize", done=1, total=2, unit=unit)
    written = write_folder(order, parent, Checkpoint.open(order.scratch / "made"), quantization=raw)
    progress.step("quantize", done=2, total=2, unit=unit)
    return written


def _quantize(order: Order, parent: Checkpoint, target: BitsAndBytesTarget) -> dict[str, Any]:
    """Let the libraries write `scratch/made`; return the quantization_config that they wrote."""
    # On the CPU even where there is a GPU: the digest is then the same on both, and the model need not fit the GPU.
    model = class_of(parent.config, trust_remote_code=order.trust_remote_code).from_pretrained(
        order.dense,
        quantization_config=_config(target, kept_dense(parent, trust_remote_code=order.trust_remote_code)),
        device_map={"": "cpu"},
        dtype="auto",
        trust_remote_code=order.trust_remote_code,
    )
    made = order.scratch / "made"
    model.save_pretrained(made)
    raw = Checkpoint.open(made).config.get("quantization_config")
    if not isinstance(raw, dict):
        raise StageFailed(f"{target.variant}: transformers wrote no quantization_config; report this with its version")
    return raw


def _config(target: BitsAndBytesTarget, dense: list[str] | None) -> Any:
    """The config of a target, which keeps the modules `dense` as they are.

    None names no `llm_int8_skip_modules`: naming some would end transformers' own rule, by which the output head and
    whatever is tied to the embedding stay dense, when writing and when loading.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if target.bits == 8:  # noqa: PLR2004 - eight bits
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=dense)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_skip_modules=dense,
        bnb_4bit_quant_type=target.type or "nf4",
        bnb_4bit_use_double_quant=target.double_quant is not False,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
