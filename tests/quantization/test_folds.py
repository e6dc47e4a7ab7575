"""Scales fold where the layer's output stays the same, whatever the architecture; nowhere else."""

import pytest
import torch
from torch import nn

from pipeline.quantization.fold_search import find_folds
from pipeline.quantization.folds import Fold, apply, attainable
from tests.architectures import ARCHITECTURES, GROUPED, SIDES, TOKENS, Architecture

QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
EXPERTS = ("mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.shared_experts.gate_proj.weight",
           "mlp.shared_experts.up_proj.weight")  # fmt: skip
OUT, DOWN = ("self_attn.o_proj.weight",), ("mlp.down_proj.weight",)
LLAMA = [
    ("norm", "input_layernorm", QKV),
    ("linear", "self_attn.v_proj", OUT),
    ("norm", "post_attention_layernorm", GATE_UP),
    ("linear", "mlp.up_proj", DOWN),
]
ALL_HEADS = Architecture(model="LlamaForCausalLM", config="LlamaConfig", keys={**GROUPED, "num_key_value_heads": 4})
PHI = Architecture(model="PhiForCausalLM", config="PhiConfig", keys=SIDES)
CLAMPED = Architecture(model="OlmoForCausalLM", config="OlmoConfig", keys={**GROUPED, "clip_qkv": 1000.0})

FOUND = {
    "llama, tied": LLAMA,
    "a head of values for each of queries": LLAMA,
    "biases on q, k and v": LLAMA,
    "gemma-3": [
        ("one_plus", "input_layernorm", QKV),
        ("linear", "self_attn.v_proj", OUT),
        ("one_plus", "pre_feedforward_layernorm", GATE_UP),
        ("linear", "mlp.up_proj", DOWN),
    ],
    # A relu lets positive scales through.
    "opt": [
        ("norm", "self_attn_layer_norm", QKV),
        ("linear", "self_attn.v_proj", ("self_attn.out_proj.weight",)),
        ("norm", "final_layer_norm", ("fc1.weight",)),
        ("linear", "fc1", ("fc2.weight",)),
    ],
    # A gelu does not.
    "gpt-neox": [
        ("norm", "input_layernorm", ("attention.query_key_value.weight",)),
        ("linear", "attention.query_key_value", ("attention.dense.weight",)),
        ("norm", "post_attention_layernorm", ("mlp.dense_h_to_4h.weight",)),
    ],
    "phi, whose norm attention and MLP share": [
        ("norm", "input_layernorm", (*QKV, "mlp.fc1.weight")),
        ("linear", "self_attn.v_proj", ("self_attn.dense.weight",)),
    ],
    "phi-3": [
        ("norm", "input_layernorm", ("self_attn.qkv_proj.weight",)),
        ("linear", "self_attn.qkv_proj", OUT),
        ("norm", "post_attention_layernorm", ("mlp.gate_up_proj.weight",)),
        ("linear", "mlp.gate_up_proj", DOWN),
    ],
    "falcon": [
        ("norm", "ln_attn", ("self_attention.query_key_value.weight",)),
        ("linear", "self_attention.query_key_value", ("self_attention.dense.weight",)),
        ("norm", "ln_mlp", ("mlp.dense_h_to_4h.weight",)),
    ],
    # Router and experts are no linear layers, and stay dense: there is nothing to scale for.
    "mixtral": LLAMA[:2],
    # The router and the experts read what the shared expert reads.
    "deepseek-v3": [
        ("norm", "input_layernorm", ("self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight")),
        ("norm", "self_attn.q_a_layernorm", ("self_attn.q_b_proj.weight",)),
        ("norm", "self_attn.kv_a_layernorm", ("self_attn.kv_b_proj.weight",)),
        ("linear", "self_attn.kv_b_proj", OUT),
        ("norm", "post_attention_layernorm", EXPERTS),
        ("linear", "mlp.shared_experts.up_proj", ("mlp.shared_experts.down_proj.weight",)),
    ],
    # Each norm feeds the residual too.
    "bert": [("linear", "attention.self.value", ("attention.output.dense.weight",))],
    # The values are clamped between v_proj and o_proj, which the sample alone would not show.
    "olmo": [("linear", "mlp.up_proj", DOWN)],
}
OTHERS = {
    "a head of values for each of queries": ALL_HEADS,
    "phi, whose norm attention and MLP share": PHI,
    "olmo": CLAMPED,
}


def last_layer(name):
    """The last layer of a model with random weights and norms, and a run of it on what it saw in the model."""
    model = (OTHERS | ARCHITECTURES)[name].build()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.2, generator=generator)
    layer = next(each for each in model.modules() if isinstance(each, nn.ModuleList))[-1]
    seen = {}
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(TOKENS.repeat(2, 1), **({} if name == "bert" else {"use_cache": False}))
    hook.remove()

    def run():
        output = layer(*seen["args"], **seen["kwargs"])
        return output if isinstance(output, torch.Tensor) else output[0]

    return layer, run


@pytest.mark.parametrize("name", FOUND)
def test_the_folds_of_an_architecture_are_found_and_leave_its_output_as_it_is(name):
    """All of them at once, with the weights as they were after the search."""
    layer, run = last_layer(name)
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    folds = find_folds(layer, run)
    assert [(fold.kind, fold.producer, fold.consumers) for fold in folds] == FOUND[name]
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())
    tensors = dict(layer.named_parameters())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        expected = run()
        for fold in folds:
            scales = torch.rand(fold.inputs // fold.repeats, generator=generator) + 0.5
            for key, tensor in apply(fold, tensors, scales).items():
                assert tensor.shape == tensors[key].shape
                tensors[key].copy_(tensor)
        found = run()
    assert (found - expected).norm() < 1e-4 * expected.norm()


class Twice(nn.Module):
    """Its norm makes two tensors, of which a linear layer reads one."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(self.norm(x)) * self.norm(2 * x + 1))


def test_a_norm_that_runs_twice_is_left_alone():
    layer, x = Twice(), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert [fold.producer for fold in find_folds(layer, lambda: layer(x))] == ["first"]


def test_weights_that_two_modules_share_are_left_alone():
    layer, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.eye(8)
    assert [fold.producer for fold in find_folds(layer, lambda: layer(x))] == ["0"]
    layer[1].weight = layer[0].weight
    assert find_folds(layer, lambda: layer(x)) == ()


def test_a_layer_without_effect_proves_nothing():
    layer, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.eye(8)
    layer[1].weight.data.zero_()
    assert find_folds(layer, lambda: layer(x)) == ()


def test_the_layer_is_restored_where_its_run_fails():
    layer, x, runs = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.eye(8), []
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}

    def run():
        runs.append(1)
        if len(runs) > 3:
            raise RuntimeError
        return layer(x)

    with pytest.raises(RuntimeError):
        find_folds(layer, run)
    assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())
    assert not any(module._forward_hooks for module in layer.modules())


def test_queries_in_groups_share_the_scales_of_their_values():
    """Four heads of two inputs, two for each head of values: inputs 0, 1 and 2, 3 read channels 0, 1."""
    fold = Fold(producer="v", consumers=("o.weight",), kind="linear", inputs=8, width=2, repeats=2, stride=2)
    scales = torch.tensor([2.0, 4.0, 8.0, 16.0])
    assert fold.expanded(scales).tolist() == [2, 4, 2, 4, 8, 16, 8, 16]
    assert torch.equal(fold.reduced(fold.expanded(scales)), scales)
    assert fold.tied(torch.arange(8.0)).tolist() == [1, 2, 1, 2, 5, 6, 5, 6]
    tensors = {"v.weight": torch.ones(4, 3), "v.bias": torch.ones(4), "o.weight": torch.ones(5, 8)}
    changed = apply(fold, tensors, scales)
    assert changed["v.weight"][:, 0].tolist() == changed["v.bias"].tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16]
    assert changed["o.weight"][0].tolist() == [2, 4, 2, 4, 8, 16, 8, 16]


def test_a_fused_layer_is_scaled_in_the_rows_of_its_values_alone():
    """GPT-NeoX: query, key and value of each head lie together; here two heads of width one."""
    fold = Fold(producer="qkv", consumers=("o.weight",), kind="linear", inputs=2, width=1, start=2, stride=3)
    assert fold.rows().tolist() == [2, 5]
    changed = apply(fold, {"qkv.weight": torch.ones(6, 2), "o.weight": torch.ones(2, 2)}, torch.tensor([2.0, 4.0]))
    assert changed["qkv.weight"][:, 0].tolist() == [1, 1, 1 / 2, 1, 1, 1 / 4]


@pytest.mark.parametrize("kind", ["norm", "one_plus"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attainable_scales_survive_the_dtype_that_the_norm_is_stored_in(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    fold = Fold(producer="norm", consumers=("q.weight",), kind=kind, inputs=64, width=64, stride=64)
    weight = torch.randn(64, generator=generator).div(4).to(dtype)
    weight[0] = -1.0 if kind == "one_plus" else 0.0
    tensors = {"norm.weight": weight, "q.weight": torch.ones(1, 64)}
    wanted = torch.rand(64, generator=generator).mul(6).sub(3).exp2()
    wanted[1] = 3000.0
    scales = attainable(fold, tensors, wanted, dtype=dtype)
    assert bool((scales > 0).all())
    stored = apply(fold, tensors, scales)["norm.weight"].to(dtype).double()
    offset = 1.0 if kind == "one_plus" else 0.0
    torch.testing.assert_close((stored + offset) * scales.double(), weight.double() + offset, rtol=2e-6, atol=1e-7)
    if kind == "norm":
        torch.testing.assert_close(scales, wanted, rtol=2**-8, atol=0)
