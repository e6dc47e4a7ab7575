"""Models packed without loss, upcast, and compared with themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from pipeline.jobs import Job, Output
from pipeline.stages import upcast as stage
from tests.architectures import STEP, Architecture


def saved(architecture: Architecture, folder: Path) -> Any:
    """The model, saved to `folder` in float32."""
    model = architecture.build()
    model.save_pretrained(folder)
    return model


def gptq(weight: Tensor) -> dict[str, Tensor]:
    """GPTQ of 8 bits, v2: a group for each channel, every zero point 128."""
    outputs, inputs = weight.shape
    codes = (weight / STEP).round().to(torch.int64) + 128
    words = (codes.T.reshape(inputs // 4, 4, outputs) << torch.arange(0, 32, 8)[:, None]).sum(1)
    return {
        "qweight": (words - ((words >> 31) << 32)).to(torch.int32),
        "qzeros": torch.full((1, outputs // 4), -2139062144, dtype=torch.int32),  # 0x80808080
        "scales": torch.full((1, outputs), STEP, dtype=torch.float16),
        "g_idx": torch.zeros(inputs, dtype=torch.int32),
    }


def fp8(weight: Tensor) -> dict[str, Tensor]:
    """e4m3 codes with a scale for each block of 128 x 128."""
    blocks = [-(-side // 128) for side in weight.shape]
    return {"weight": (weight / STEP).to(torch.float8_e4m3fn), "weight_scale_inv": torch.full(blocks, STEP)}


def int8(weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors of 8-bit integers, a scale for each output."""
    return {"weight": (weight / STEP).round().to(torch.int8), "weight_scale": torch.full((len(weight), 1), STEP)}


PACKERS: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2", "sym": False}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}),
    "compressed-tensors": (int8, {
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel",
        }}},
    }),
}  # fmt: skip


def pack(folder: Path, model: Any, *, dense: str, layout: str = "gptq") -> list[str]:
    """Pack the linear weights of `model` that lie in `folder`, but those that `dense` finds; return their modules."""
    packer, config = PACKERS[layout]
    tensors = stored(folder)
    modules = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.ndim == 2 and not re.search(dense, name.removesuffix(".weight"))
    ]
    turned = any(isinstance(module, Conv1D) for module in model.modules())
    for module in modules:
        weight = tensors.pop(f"{module}.weight")
        parts = packer(weight.T.contiguous() if turned else weight)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    store(folder, tensors)
    configure(folder, quantization_config=config)
    return modules


def stored(folder: Path) -> dict[str, Tensor]:
    """The tensors of the folder's only shard."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def store(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Make `tensors` the folder's only shard."""
    whole = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **keys: Any) -> None:
    """Set keys of the folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}), encoding="utf-8")


def upcast(source: Path, workspace: Path, *, dtype: str = "float32") -> Output:
    """Run the stage on `source`."""
    (output,) = stage.run(Job(inputs={"source": source}, options={"dtype": dtype}, workspace=workspace))
    return output


def reloaded(folder: Path, name: str, *, dtype: Any = "auto") -> Any:
    """The model of class `name`, by default in the dtype that its config says, with every key in its place."""
    model, report = getattr(transformers, name).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@torch.inference_mode()
def check_same(model: Any, other: Any, inputs: Mapping[str, Tensor]) -> None:
    """Every tensor of the two models is equal, and so is what they make of `inputs`."""
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name].double(), two[name].double())]
    first, second = model(**inputs)[0], other(**inputs)[0]
    assert first.isfinite().all()
    assert first.std() > 0
    # The weights are equal to the bit; a matrix product over another memory layout may round otherwise.
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
