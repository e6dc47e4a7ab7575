"""Let AutoAWQ 0.2.9 pack layers in its GEMV and GEMV fast layouts: `python make_awq_gemv.py AUTOAWQ_SOURCE`.

AUTOAWQ_SOURCE is its unpacked source distribution; the two files are imported without the package around them, which
fails with transformers 5. The kernels need CUDA, so `expected` is what AutoAWQ hands to its packer: the float32 weight
[O, I] on its grid. Each case becomes `awq_gemv/<layout>-<group size>.safetensors`.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

INPUTS, OUTPUTS = 128, 16


def main(source: Path) -> None:
    """Write every case."""
    for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(source / name.replace(".", "/"))]
        sys.modules[name] = package
    for layout, size in [("gemv", 32), ("gemv", 64), ("gemv", 128), ("gemv_fast", 32), ("gemv_fast", 128)]:
        module = importlib.import_module(f"awq.modules.linear.{layout}")
        packer = module.WQLinear_GEMV if layout == "gemv" else module.WQLinear_GEMVFast
        linear, scales, zeros = layer(size)
        packed = packer.from_linear(linear, 4, size, scales=scales, zeros=zeros)
        tensors = {name: tensor.contiguous() for name, tensor in packed.state_dict().items()}
        folder = Path(__file__).parent / "awq_gemv"
        save_file(tensors | {"expected": linear.weight.data}, folder / f"{layout}-{size}.safetensors")


def layer(size: int) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A layer on a 4-bit grid, with the scales and zero points [O, G] of that grid."""
    generator = torch.Generator().manual_seed(size)
    linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False).requires_grad_(requires_grad=False)
    groups = torch.randn(OUTPUTS, INPUTS // size, size, generator=generator)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    zeros = torch.round(-low / scales).clamp(0, 15)
    codes = torch.round(groups / scales[:, :, None] + zeros[:, :, None]).clamp(0, 15)
    linear.weight.data = ((codes - zeros[:, :, None]) * scales[:, :, None]).flatten(1)
    return linear, scales, zeros


if __name__ == "__main__":
    main(Path(sys.argv[1]))
