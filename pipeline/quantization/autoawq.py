"""AWQ, written by AutoAWQ, for those who ask for it by name; in a process of its own.

AutoAWQ 0.2.9 is the last one: its authors have ended it. One thing of it is set right here: it keeps the weights that
its scale search goes back to with `.cpu()`, which copies nothing where they are on the CPU already, and the first
scales that it tries then stay in them. And on a CPU it multiplies in float32, not in float16.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version
from typing import Any

from pipeline import progress
from pipeline.checkpoint import Checkpoint
from pipeline.errors import StageFailed, UnsupportedFormat
from pipeline.quantization.folder import Order, Written, scan, write_folder
from pipeline.targets import AWQTarget


def write(order: Order) -> Written:
    """Quantize `order.dense` to AWQ in the GEMM layout and write `order.out`.

    Raise UnsupportedFormat, before a weight is loaded, for an architecture that AutoAWQ does not know.
    """
    assert isinstance(order.target, AWQTarget)
    parent = order.clear()
    scan(parent)
    made = order.scratch / "made"
    _quantize(order, order.target, parent).save_quantized(str(made))
    raw = Checkpoint.open(made).config.get("quantization_config")
    if not isinstance(raw, dict):
        raise StageFailed(f"{order.target.variant}: AutoAWQ wrote no quantization_config; report this")
    said = {**raw, "meta": {"quantizer": [f"autoawq:{version('autoawq')}"]}}
    return write_folder(order, parent, Checkpoint.open(made), quantization=said, scaled=True)


def _quantize(order: Order, target: AWQTarget, parent: Checkpoint) -> Any:
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its farewell
        from awq import AutoAWQForCausalLM
        from awq.models.auto import AWQ_CAUSAL_LM_MODEL_MAP as KNOWN

    if parent.model_type not in KNOWN:
        raise UnsupportedFormat(f"{target.variant}: AutoAWQ knows no {parent.model_type}; leave engine: autoawq out")
    transformers.set_seed(order.seed)
    model = AutoAWQForCausalLM.from_pretrained(
        str(order.dense),
        torch_dtype=torch.float16 if torch.cuda.is_available() else torch.float32,
        trust_remote_code=order.trust_remote_code,
        device_map=None,
    )
    model.quantize(
        quant_config={"zero_point": True, "q_group_size": target.group_size, "w_bit": target.bits, "version": "GEMM"},
        calib_data=[list(sample) for sample in order.calibration],
        max_calib_samples=len(order.calibration),
        max_calib_seq_len=len(order.calibration[0]),
        quantizer_cls=_quantizer(f"{target.variant} layers"),
    )
    return model


def _quantizer(unit: str) -> Any:
    """AutoAWQ's quantizer, which says how far it is and goes back to the weights as they were."""
    from awq.quantize.quantizer import AwqQuantizer

    class Quantizer(AwqQuantizer):  # type: ignore[misc]  # AutoAWQ is untyped
        def _apply_quant(self, module: Any, named_linears: Any) -> None:
            super()._apply_quant(module, named_linears)
            progress.step("quantize", done=[*self.modules].index(module) + 1, total=len(self.modules), unit=unit)

        def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, module2inspect: Any, *rest: Any) -> Any:
            values = module2inspect.state_dict
            module2inspect.state_dict = lambda: {name: value.clone() for name, value in values().items()}
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest)
            finally:
                del module2inspect.state_dict

    return Quantizer
