"""An AWQ folder has the scales of activations that transformers asks for, and they are ones."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import Checkpoint
from pipeline.jobs import Job
from pipeline.kept import Donor
from pipeline.manifest import read_content
from pipeline.quantization import engine, kept_whole
from pipeline.quantization.activation_scales import scales_of
from pipeline.quantization.folder import Order
from pipeline.stages import upcast
from pipeline.targets import parse_target
from tests.checkpoints import tiny_llama, tiny_tokenizer

AWQ = parse_target("awq:group_size=32")
TOKENS = {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128, **TOKENS}
SHORT = {"n_layer": 2, "n_head": 4, **TOKENS}


def saved(folder, kind, **keys):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**keys)).half()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def bloom(folder):
    return saved(folder, "Bloom", hidden_size=64, **SHORT)


@pytest.mark.parametrize(
    ("kind", "keys", "activation", "inside"),
    [
        ("Starcoder2", {**LAYERS, "num_key_value_heads": 2}, "model.layers.{}.mlp.act", 128),
        ("GPTNeoX", LAYERS, "gpt_neox.layers.{}.mlp.act", 128),
        ("GPTJ", {**SHORT, "n_embd": 64, "rotary_dim": 8}, "transformer.h.{}.mlp.act", 256),
        ("Bloom", {**SHORT, "hidden_size": 64}, "transformer.h.{}.mlp.gelu_impl", 256),
    ],
)
def test_each_layer_of_such_an_architecture_has_ones_as_wide_as_its_mlp(tmp_path, kind, keys, activation, inside):
    found = scales_of(AWQ, Checkpoint.open(saved(tmp_path, kind, **keys)), trust_remote_code=False)
    assert list(found) == [f"{activation.format(layer)}.scales" for layer in range(2)]
    assert all(torch.equal(ones, torch.ones(inside, dtype=torch.float16)) for ones in found.values())


def test_names_on_disk_keep_the_prefix_that_the_parent_has_or_lacks(tmp_path):
    path = bloom(tmp_path) / "model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(path).items()}, path, {"format": "pt"})
    found = scales_of(AWQ, Checkpoint.open(tmp_path), trust_remote_code=False)
    assert list(found) == [f"h.{layer}.mlp.gelu_impl.scales" for layer in range(2)]


def test_other_formats_and_architectures_have_none(tmp_path):
    parent = Checkpoint.open(bloom(tmp_path / "bloom"))
    assert not scales_of(parse_target("gptq"), parent, trust_remote_code=False)
    llama = Checkpoint.open(tiny_llama(tmp_path / "llama", layers=1))
    assert not scales_of(AWQ, llama, trust_remote_code=False)


def test_what_is_quantized_what_is_copied_from_it_and_what_is_upcast_again_agree(tmp_path):
    rows = torch.randint(3, 255, (4, 32), generator=torch.Generator().manual_seed(0)).tolist()
    order = Order(
        dense=bloom(tmp_path / "dense"), out=tmp_path / "awq", scratch=tmp_path / "scratch", target=AWQ,
        calibration=tuple(map(tuple, rows)),
    )  # fmt: skip
    engine.write([order])
    made = load_file(order.out / "model.safetensors")
    assert torch.equal(made["transformer.h.1.mlp.gelu_impl.scales"], torch.ones(256).half())

    packed = read_content(order.out).packed
    donor = Donor(reference="awq", folder=order.out, made_from={}, packed=packed, folded=True)
    kept_whole.write(
        Order(
            dense=order.dense, out=tmp_path / "copy", scratch=tmp_path / "again", target=AWQ,
            kept=dict.fromkeys(packed, donor), described_by=donor,
        )
    )  # fmt: skip
    copy = load_file(tmp_path / "copy" / "model.safetensors")
    assert copy.keys() == made.keys()
    assert all(torch.equal(tensor, made[name]) for name, tensor in copy.items())

    (dense,) = upcast.run(Job(inputs={"source": order.out}, options={"dtype": "float32"}, workspace=tmp_path / "up"))
    assert set(dense.notes["dropped"].values()) == {"scales of ones, which change nothing"}
