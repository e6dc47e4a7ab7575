"""Let hqq 0.2.8.post1 quantize layers: `python make_hqq.py`.

Writes `hqq/layers.safetensors`: for each case the tensors of `HQQLinear.state_dict` as `<case>.<name>`, and
`<case>.expected`, the weight [O, I] that its `dequantize` returns in the case's compute dtype.
"""

from __future__ import annotations

from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file

# bits, group size (none: a whole row or column), axis, shape [O, I], compute dtype, view as float
CASES = [(bits, 32, axis, (16, 64), torch.float32, False) for bits in (8, 4, 3, 2, 1) for axis in (0, 1)] + [
    (4, 32, 1, (16, 48), torch.float32, False),  # a group in two rows
    (4, 48, 0, (16, 48), torch.float32, False),
    (4, None, 1, (16, 64), torch.float32, False),
    (4, None, 0, (16, 64), torch.float32, False),
    (4, 32, 1, (16, 64), torch.float16, True),
    (3, 32, 0, (16, 64), torch.bfloat16, True),
]


def main(folder: Path) -> None:
    """Write every case."""
    torch.cuda.empty_cache = lambda: None
    tensors = {}
    for number, (bits, size, axis, shape, dtype, viewed) in enumerate(CASES):
        torch.manual_seed(number)
        linear = torch.nn.Linear(shape[1], shape[0], bias=False)
        config = BaseQuantizeConfig(nbits=bits, group_size=size, axis=axis, view_as_float=viewed)
        layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
        case = f"{bits}-{size}-{axis}-{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}"
        stored = layer.state_dict() | {"expected": layer.dequantize()}
        tensors |= {f"{case}.{name}": tensor.detach().contiguous() for name, tensor in stored.items()}
    save_file(tensors, folder / "layers.safetensors")


if __name__ == "__main__":
    main(Path(__file__).parent / "hqq")
