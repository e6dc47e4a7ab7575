"""What the engine packs of architectures beside Llama, plain transformers finds again: whole, near the dense one."""

from __future__ import annotations

import pytest
import torch
import transformers

from pipeline import child
from pipeline.jobs import Job
from pipeline.quantization import engine
from pipeline.quantization.folder import Order
from pipeline.stages import upcast
from pipeline.targets import parse_target
from tests.checkpoints import tiny_tokenizer

SIDES = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OLDER = {
    "vocab_size": 256, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE = {**SIDES, "head_dim": 32}
# Masks by layer, norms that add one, attention and MLP side by side, fused gate and up, LayerNorm with biases.
MODELS = {
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**WIDE, "sliding_window": 16}),
    "Cohere2ForCausalLM": ("Cohere2Config", SIDES),
    "Phi3ForCausalLM": ("Phi3Config", SIDES),
    "Glm4ForCausalLM": ("Glm4Config", WIDE),
    # Scaled activations, which transformers asks AWQ for.
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SIDES),
    "BloomForCausalLM": ("BloomConfig", {**OLDER, "hidden_size": 128}),
    "GPTJForCausalLM": ("GPTJConfig", {**OLDER, "n_embd": 128, "n_positions": 256, "rotary_dim": 8}),
    "Starcoder2ForCausalLM": ("Starcoder2Config", SIDES),
    # 16 outputs, the fewest that torch's int4 kernel runs.
    "LlamaForCausalLM": ("LlamaConfig", {**SIDES, "num_key_value_heads": 1, "head_dim": 16}),
}


def dense(folder, name):
    config, keys = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(getattr(transformers, config)(**keys)).half().eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def upcast_of(folder):
    options = {"dtype": "float32"}
    (output,) = upcast.run(
        Job(inputs={"source": folder}, options=options, workspace=folder.with_name(f"{folder.name}-up"))
    )
    return output.folder


@pytest.mark.slow
def test_every_architecture_reloads_whole_and_says_nearly_the_same(tmp_path):
    rows = torch.randint(3, 255, (8, 64), generator=torch.Generator().manual_seed(0)).tolist()
    folders = {}
    for name in MODELS:
        source = dense(tmp_path / name / "dense", name)
        orders = [
            Order(
                dense=source, out=tmp_path / name / form, scratch=tmp_path / name / "scratch" / form,
                target=parse_target(f"{form}:group_size=32"), calibration=tuple(map(tuple, rows)),
            )
            for form in ("gptq", "awq")
        ]  # fmt: skip
        engine.write(orders)
        folders |= {order.out: source for order in orders}
    restored = {folder: upcast_of(folder) for folder in folders}
    everything = [*folders, *dict.fromkeys(folders.values()), *restored.values()]
    found = dict(zip(everything, child.run("tests.quantization.reloading:several", everything), strict=True))
    for folder, source in folders.items():
        assert not any(found[folder]["report"].values()), (folder, found[folder]["report"])
        assert any(kind.startswith("TorchAten") for kind in found[folder]["modules"].values()), folder
        logits, right = (torch.tensor(found[one]["logits"]) for one in (folder, source))
        assert 0 < float((logits - right).std() / right.std()) < 0.35, folder
        ours = torch.tensor(found[restored[folder]]["logits"])
        # Their kernels multiply in 16 bits.
        assert float((logits - ours).std() / ours.std()) < 0.02, folder
