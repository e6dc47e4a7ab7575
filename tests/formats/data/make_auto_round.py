"""Let auto-round 0.16.1 quantize and export a tiny Llama: `PYTHONPATH=<repository> python make_auto_round.py`.

Each case becomes `auto_round/<case>.safetensors`: two modules of the export under their own names, and
`<module>.expected`, the float16 weight [O, I] that auto-round's own torch module computes with. `cases.json` maps a
case to the quantization_config that was exported.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from auto_round import AutoRound
from auto_round.export.export_to_autoround.export import dynamic_import_quant_linear_for_packing
from auto_round.export.export_to_awq.utils import dequantize_gemm
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.checkpoints import tiny_llama

EIGHT = {"bits": 8, "group_size": 64}
CASES = {  # format, bits, symmetric, layer_config
    "plain": ("auto_round", 4, False, {"model.layers.0.mlp.down_proj": EIGHT}),
    "symmetric": ("auto_round", 4, True, {"mlp.down_proj": EIGHT}),  # a pattern; exported as auto_gptq
    "auto_gptq": ("auto_round:auto_gptq", 3, False, {}),
    "gptqmodel": ("auto_round:gptqmodel", 2, False, {}),
    "auto_awq": ("auto_round:auto_awq", 4, False, {}),
}
MODULES = ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.k_proj")


def main(folder: Path, scratch: Path) -> None:
    """Write every case."""
    dense = tiny_llama(scratch / "dense", hidden=64, intermediate=64, layers=1)
    configs = {}
    for case, (layout, bits, symmetric, layers) in CASES.items():
        model, tokenizer = AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(dense)
        rounding = AutoRound(
            model, tokenizer, bits=bits, group_size=32, sym=symmetric, iters=0, disable_opt_rtn=True,
            layer_config=layers, device_map="cpu",
        )  # fmt: skip
        rounding.quantize_and_save(str(scratch / case), format=layout)
        (export,) = (scratch / case).glob("**/model.safetensors")
        configs[case] = json.loads((export.parent / "config.json").read_text())["quantization_config"]
        stored, kept = load_file(export), {}
        for module in MODULES:
            parts = {name.rpartition(".")[2]: stored[name] for name in stored if name.startswith(module)}
            own = {"bits": bits, "group_size": 32} | (EIGHT if layers and "down" in module else {})
            parts["expected"] = expected(parts, configs[case]["packing_format"], **own)
            kept |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        save_file(kept, folder / f"{case}.safetensors")
    (folder / "cases.json").write_text(json.dumps(configs, indent=1) + "\n")


def expected(parts: dict[str, torch.Tensor], layout: str, *, bits: int, group_size: int) -> torch.Tensor:
    """The weight [O, I] that auto-round's module multiplies by."""
    if "awq" in layout:
        weight = dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], bits, group_size)
        return weight.T.contiguous()
    outputs, inputs = parts["scales"].shape[1], parts["qweight"].shape[0] * 32 // bits
    build = dynamic_import_quant_linear_for_packing(layout, bits, group_size, sym=False)
    module = build(bits, group_size, inputs, outputs, bias=False)
    module.load_state_dict(parts)
    return module(torch.eye(inputs, dtype=torch.float16)).T.contiguous()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(__file__).parent / "auto_round", Path(scratch))
