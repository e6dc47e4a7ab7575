"""A program that lets gptqmodel pack GPTQ and AWQ modules, and writes them with what gptqmodel itself makes of them.

It runs in a process of its own, since importing gptqmodel changes transformers. Arguments: the folder to write to, and
a dense checkpoint. Each case becomes `<case>.safetensors`: the packed components, and `expected`, the dense weight
[O, I] that gptqmodel's own kernel computes with. `cases.json` maps a case to its quantization_config.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization import FORMAT, METHOD
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

INPUTS, OUTPUTS = 192, 96
# 192 inputs in groups of 128 leave a short last group. Then: desc_act, symmetric, version.
GPTQ_CASES = [
    (bits, group_size, *rest)
    for bits, group_size in itertools.product((2, 3, 4, 8), (32, 128, -1))
    for rest in ((False, True, "gptq"), (True, False, "gptq"), (True, False, "gptq_v2"))
]


def main(folder: Path, dense: Path) -> None:
    """Write every case, and the whole model in `dense` quantized to GPTQ and to AWQ."""
    cases = {}
    for bits, group_size, ordered, symmetric, version in GPTQ_CASES:
        name = f"gptq-{bits}-{group_size}-{ordered}-{symmetric}-{version}"
        cases[name] = {
            "quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": ordered, "sym": symmetric,
            "checkpoint_format": version,
        }  # fmt: skip
        save_file(gptq(cases[name], seed=len(cases)), folder / f"{name}.safetensors")
    for group_size in (32, 64, -1):
        name = f"awq-4-{group_size}"
        cases[name] = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}
        save_file(awq(group_size, seed=len(cases)), folder / f"{name}.safetensors")
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    eight_bit = {r".*\.down_proj": {"bits": 8, "group_size": 64}, r"-:.*\.o_proj": {}}
    config = QuantizeConfig(bits=4, group_size=32, desc_act=True, sym=False, dynamic=eight_bit)
    whole(dense, folder / "whole-gptq", config, BACKEND.GPTQ_TORCH)
    config = QuantizeConfig(bits=4, group_size=32, sym=False, method=METHOD.AWQ, format=FORMAT.GEMM)
    whole(dense, folder / "whole-awq", config, BACKEND.AWQ_TORCH)


def whole(dense: Path, folder: Path, config: QuantizeConfig, backend: BACKEND) -> None:
    """A checkpoint that gptqmodel wrote; `<folder>.expected.safetensors` is what its modules compute with, reloaded."""
    model = GPTQModel.load(str(dense), config)
    model.quantize(
        [{"input_ids": list(range(3 + i, 67 + i)), "attention_mask": [1] * 64} for i in range(4)],
        batch_size=4,
        backend=backend,
    )
    model.save(str(folder))
    # It casts the stored scales to the dtype it loads in: only their own dtype keeps them.
    stored = {BACKEND.GPTQ_TORCH: torch.float16, BACKEND.AWQ_TORCH: torch.bfloat16}
    loaded = GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=stored[backend])
    expected = {}
    for name, module in loaded.model.named_modules():
        if isinstance(module, TorchLinear):
            expected[name] = module.dequantize_weight().T.contiguous()
        elif isinstance(module, AwqTorchLinear):
            eye = torch.eye(module.in_features, dtype=module.scales.dtype)
            expected[name] = module(eye).T.contiguous()
    save_file(expected, folder.with_suffix(".expected.safetensors"))


def gptq(config: dict[str, object], seed: int) -> dict[str, torch.Tensor]:
    """A module as gptqmodel's writer packs it: its packer, then its conversion to v1 where v1 is asked for."""
    bits, group_size = config["bits"], config["group_size"]
    linear, generator = layer(seed)
    order = torch.arange(INPUTS) // (INPUTS if group_size == -1 else group_size)
    if config["desc_act"]:
        order = order[torch.randperm(INPUTS, generator=generator)]
    scales, zeros = grid(linear.weight.data, order, bits, symmetric=config["sym"])
    module = TorchLinear(
        bits=bits, group_size=group_size, sym=config["sym"], desc_act=config["desc_act"], in_features=INPUTS,
        out_features=OUTPUTS, bias=False, pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    module.pack_block(linear, scales, zeros, order.int())
    module.post_init()
    if config["checkpoint_format"] == "gptq":
        convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits))
    packed = {name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    if config["checkpoint_format"] == "gptq":  # as its loader does
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    # As its packer computes them.
    codes = torch.round((linear.weight + (zeros * scales)[:, order]) / scales[:, order]).clamp(0, 2**bits - 1)
    packed |= {"codes": codes.to(torch.uint8), "zeros": zeros.to(torch.uint8)}
    return packed | {"expected": module.dequantize_weight().T.contiguous()}


def awq(group_size: int, seed: int) -> dict[str, torch.Tensor]:
    """A module as gptqmodel packs it; a forward pass over the identity gives its weight, [I, O]."""
    linear, _ = layer(seed)
    order = torch.arange(INPUTS) // (INPUTS if group_size == -1 else group_size)
    scales, zeros = grid(linear.weight.data, order, 4, symmetric=False)
    module = AwqTorchLinear(
        bits=4, group_size=group_size, sym=False, desc_act=False, in_features=INPUTS, out_features=OUTPUTS,
        register_buffers=True,
    )  # fmt: skip
    module.pack(linear, scales.half(), zeros)
    module.post_init()
    packed = {name: getattr(module, name).clone() for name in ("qweight", "qzeros", "scales")}
    return packed | {"expected": module(torch.eye(INPUTS, dtype=torch.float16)).T.contiguous()}


def layer(seed: int) -> tuple[torch.nn.Linear, torch.Generator]:
    """A random layer; the first outputs are positive, so that asymmetric grids have zero points of 0."""
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data.normal_(generator=generator)
    linear.weight.data[:8].abs_()
    return linear.requires_grad_(requires_grad=False), generator


def grid(weight: torch.Tensor, order: torch.Tensor, bits: int, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [O, G] that span each group's range."""
    groups = [weight[:, order == group] for group in range(int(order.max()) + 1)]
    low = torch.stack([group.amin(1) for group in groups], 1).clamp(max=0)
    high = torch.stack([group.amax(1) for group in groups], 1).clamp(min=0)
    top = 2**bits - 1
    if symmetric:
        return torch.maximum(-low, high) * 2 / top, torch.full_like(low, 2 ** (bits - 1))
    scales = ((high - low) / top).half().float()
    return scales, torch.round(-low / scales).clamp(0, top)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
