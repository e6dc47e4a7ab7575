"""The scales of an activation go into the layer that takes its output."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline.errors import UnsupportedFormat
from pipeline.formats.scaled_activation import consumer, fold
from pipeline.jobs import Job
from pipeline.stages import upcast

TOKENS = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0}
HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2}
SHORT = {"n_layer": 1, "n_head": 2}
ARCHITECTURES = [
    (
        transformers.Starcoder2Config(hidden_size=16, intermediate_size=64, num_key_value_heads=1, **HEADS, **TOKENS),
        "model.layers.0.mlp.act", "model.layers.0.mlp.c_proj",
    ),
    (
        transformers.FalconConfig(hidden_size=16, **HEADS, **TOKENS),
        "transformer.h.0.mlp.act", "transformer.h.0.mlp.dense_4h_to_h",
    ),
    (
        transformers.MptConfig(d_model=16, n_layers=1, n_heads=2, **TOKENS),
        "transformer.blocks.0.ffn.act", "transformer.blocks.0.ffn.down_proj",
    ),
    (
        transformers.GPTJConfig(n_embd=16, rotary_dim=4, **SHORT, **TOKENS),
        "transformer.h.0.mlp.act", "transformer.h.0.mlp.fc_out",
    ),
    (
        transformers.GPTNeoXConfig(hidden_size=16, intermediate_size=64, **HEADS, **TOKENS),
        "gpt_neox.layers.0.mlp.act", "gpt_neox.layers.0.mlp.dense_4h_to_h",
    ),
    (
        transformers.GPTBigCodeConfig(n_embd=16, **SHORT, **TOKENS),
        "transformer.h.0.mlp.act", "transformer.h.0.mlp.c_proj",
    ),
    (
        transformers.BloomConfig(hidden_size=16, **SHORT, **TOKENS),
        "transformer.h.0.mlp.gelu_impl", "transformer.h.0.mlp.dense_4h_to_h",
    ),
    (  # as wide inside as outside: both layers have 16 inputs
        transformers.GPTNeoXConfig(hidden_size=16, intermediate_size=16, **HEADS, **TOKENS),
        "gpt_neox.layers.0.mlp.act", "gpt_neox.layers.0.mlp.dense_4h_to_h",
    ),
]  # fmt: skip


class Scaled(nn.Module):
    """What AutoAWQ puts in an activation's place."""

    def __init__(self, act, scales):
        super().__init__()
        self.act, self.scales = act, scales

    def forward(self, x):
        return self.act(x) / self.scales


@pytest.mark.parametrize(("config", "activation", "layer"), ARCHITECTURES)
def test_the_model_computes_the_same_with_its_scales_folded_in(config, activation, layer):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = model.get_submodule(layer).in_features
    assert consumer(model, f"{activation}.scales", count=count) == layer
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    scales, tokens = torch.rand(count) + 0.5, torch.arange(8)[None]
    parent, _, own = activation.rpartition(".")
    act = model.get_submodule(activation)
    setattr(model.get_submodule(parent), own, Scaled(act, scales))
    with torch.no_grad():
        expected = model(tokens).logits
        setattr(model.get_submodule(parent), own, act)
        assert not torch.allclose(model(tokens).logits, expected, atol=1e-5)
        linear = model.get_submodule(layer)
        linear.weight.data = fold(linear.weight.data, scales)
        assert torch.allclose(model(tokens).logits, expected, atol=1e-5)


def test_each_column_is_divided_by_its_scale_and_the_weight_is_left_alone():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert fold(weight, torch.tensor([2.0, 0.5]).half()).tolist() == [[0.5, 4.0], [1.5, 8.0]]
    assert weight.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def block(**layers):
    return nn.ModuleDict({"mlp": nn.ModuleDict({"act": nn.GELU()} | layers)})


@pytest.mark.parametrize(
    ("layers", "name", "said"),
    [
        ({"down": nn.Linear(8, 4)}, "mlp.gelu.scales", "no activation mlp.gelu"),
        ({"down": nn.Linear(8, 4)}, "other.act.scales", "no activation other.act"),
        ({"down": nn.Linear(8, 4)}, "mlp.down.scales", "no activation mlp.down"),
        ({"down": nn.Linear(4, 8)}, "mlp.act.scales", "takes its 8 values, found none"),
        ({"fc_in": nn.Linear(8, 8)}, "mlp.act.scales", "found none"),
        ({"one": nn.Linear(8, 4), "two": nn.Linear(8, 4)}, "mlp.act.scales", "found one and two"),
    ],
)
def test_scales_whose_layer_is_not_certain_are_refused_in_a_sentence(layers, name, said):
    with pytest.raises(UnsupportedFormat, match=said):
        consumer(block(**layers), name, count=8)


def awq_checkpoint(folder):
    """A Starcoder2 whose second feed-forward layer is packed to 4 bits, with the scales of its activation beside it."""
    config = transformers.Starcoder2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    stored, module = load_file(folder / "model.safetensors"), "model.layers.0.mlp"
    codes = torch.randint(16, (64, 32))
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    words = (codes.view(64, 4, 8)[:, :, order].long() << torch.arange(0, 32, 4)).sum(-1)
    del stored[f"{module}.c_proj.weight"]
    packed = {
        f"{module}.c_proj.qweight": (words - ((words >> 31) << 32)).int(),
        f"{module}.c_proj.qzeros": torch.full((2, 4), -2004318072, dtype=torch.int32),  # 0x88888888
        f"{module}.c_proj.scales": torch.full((2, 32), 0.25).half(),
        f"{module}.act.scales": torch.exp2(torch.randint(-2, 3, (64,)).float()).half(),
    }
    save_file(stored | packed, folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps(said))
    return ((codes - 8) * 0.25 / packed[f"{module}.act.scales"].float()[:, None]).T


def test_an_upcast_folds_them_in_and_says_where_they_went(tmp_path):
    weight = awq_checkpoint(tmp_path / "source")
    (output,) = upcast.run(
        Job(inputs={"source": tmp_path / "source"}, options={"dtype": "float32"}, workspace=tmp_path)
    )
    assert output.notes["dropped"] == {
        "model.layers.0.mlp.act.scales": "divided out of model.layers.0.mlp.c_proj.weight"
    }
    model, found = transformers.AutoModelForCausalLM.from_pretrained(output.folder, output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(model.model.layers[0].mlp.c_proj.weight, weight)


def test_scales_of_ones_leave_the_weight_what_its_codes_say(tmp_path):
    awq_checkpoint(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.0.mlp.act.scales"] = torch.ones(64).half()
    save_file(stored, path, metadata={"format": "pt"})
    (output,) = upcast.run(Job(inputs={"source": path.parent}, options={"dtype": "float32"}, workspace=tmp_path))
    assert output.notes["dropped"] == {"model.layers.0.mlp.act.scales": "scales of ones, which change nothing"}
    _, found = transformers.AutoModelForCausalLM.from_pretrained(output.folder, output_loading_info=True)
    assert not any(found.values())


def test_scales_without_their_layer_are_refused(tmp_path):
    awq_checkpoint(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    stored = load_file(path)
    stored["model.layers.0.mlp.act.scales"] = torch.ones(48)
    save_file(stored, path)
    with pytest.raises(UnsupportedFormat, match="one layer beside it that takes its 48 values, found none"):
        list(upcast.run(Job(inputs={"source": path.parent}, options={"dtype": "float32"}, workspace=tmp_path)))
