"""Experts lie on disk one by one or all in one tensor; what transformers cannot put together is refused."""

import pytest
import torch
import transformers

from pipeline.errors import UnexpectedTensor
from tests.architectures import ARCHITECTURES, STEP
from tests.packed_models import check_same, configure, pack, reloaded, saved, store, stored, upcast

FUSED = ("experts.gate_up_proj", "experts.down_proj")


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3", "llama-4", "gpt-oss"])
def test_experts_in_one_fp8_tensor_come_back(name, tmp_path):
    architecture = ARCHITECTURES[name]
    model = saved(architecture, tmp_path / "source")
    store(tmp_path / "source", model.state_dict())
    modules = pack(tmp_path / "source", model, dense=architecture.dense, layout="fp8")
    tensors = stored(tmp_path / "source")
    experts = [key for key in tensors if key.endswith(FUSED)]
    for key in experts:
        blocks = (len(tensors[key]), *(-(-side // 128) for side in tensors[key].shape[1:]))
        tensors[f"{key}_scale_inv"] = torch.full(blocks, STEP)
        tensors[key] = (tensors[key] / STEP).to(torch.float8_e4m3fn)
    store(tmp_path / "source", tensors)
    output = upcast(tmp_path / "source", tmp_path)
    assert output.metrics["dequantized"] == len(modules) + len(experts)
    check_same(model, reloaded(output.folder, architecture.model), architecture.inputs)


def test_the_experts_of_gpt_oss_in_mxfp4_are_what_transformers_dequantizes_them_to(tmp_path):
    architecture = ARCHITECTURES["gpt-oss"]
    saved(architecture, tmp_path)
    tensors = stored(tmp_path)
    random = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if key.endswith(FUSED)]:
        experts, inputs, outputs = tensors.pop(key).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=random, dtype=torch.uint8)
        tensors[f"{key}_scales"] = torch.randint(120, 125, shape, generator=random, dtype=torch.uint8)
    store(tmp_path, tensors)
    configure(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    kind = transformers.GptOssForCausalLM
    expected = kind.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=transformers.Mxfp4Config(dequantize=True)
    )
    output = upcast(tmp_path, tmp_path / "work", dtype="bfloat16")
    assert output.metrics["dequantized"] == 4
    again = reloaded(output.folder, architecture.model, dtype=torch.float32)
    check_same(expected.float().eval(), again, architecture.inputs)


@pytest.mark.parametrize("name", ["llama-4", "gpt-oss"])
def test_experts_taken_apart_that_transformers_does_not_put_together_are_refused(name, tmp_path):
    """llm-compressor takes them apart; transformers would load the rest and leave the experts random."""
    model = saved(ARCHITECTURES[name], tmp_path / "source")
    tensors = stored(tmp_path / "source")
    for key in [key for key in tensors if key.endswith("experts.down_proj")]:
        for i, expert in enumerate(tensors.pop(key)):
            tensors[key.replace("experts", f"experts.{i}") + ".weight"] = expert.T
    store(tmp_path / "source", tensors)
    pack(tmp_path / "source", model, dense=ARCHITECTURES[name].dense)
    with pytest.raises(UnexpectedTensor, match=r"experts\.0\.down_proj\.weight: \S+ has no place for it"):
        upcast(tmp_path / "source", tmp_path)
    assert not (tmp_path / "out").exists()
