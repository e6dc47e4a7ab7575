"""What no library reloads is refused before it is quantized, by what config.json and the headers say."""

from __future__ import annotations

import json

import pytest
from transformers import GlmConfig, GlmForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from pipeline import reloadable
from pipeline.catalog import DENSE
from pipeline.checkpoint import Checkpoint
from pipeline.errors import UnsupportedFormat
from pipeline.reloadable import check_reload
from pipeline.sizes import dense_sizes
from pipeline.targets import parse_target
from tests.checkpoints import tiny_llama
from tests.classifiers import SIDES, tiny_head


def check(folder, target):
    checkpoint = Checkpoint.open(folder)
    check_reload(checkpoint, dense_sizes(checkpoint, DENSE), parse_target(target))


def gpt2(folder):
    keys = {"vocab_size": 256, "n_embd": 128, "n_layer": 1, "n_head": 4, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**keys)).save_pretrained(folder)


def glm(folder):
    GlmForCausalLM(GlmConfig(**SIDES, num_key_value_heads=2, head_dim=32)).save_pretrained(folder)


def mixtral(folder):
    MixtralForCausalLM(MixtralConfig(**SIDES, num_key_value_heads=2, num_local_experts=2)).save_pretrained(folder)


@pytest.mark.parametrize("target", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: tiny_head(f, "BertForSequenceClassification"), "bert cannot be reloaded .*it is no decoder"),
        (lambda f: tiny_head(f, "BertForTokenClassification"), "bert cannot be reloaded"),
        (lambda f: tiny_head(f, "RobertaForSequenceClassification"), "roberta cannot be reloaded .*it is no decoder"),
        (lambda f: tiny_head(f, "LlamaModel"), "llama cannot be reloaded .*base model"),
        (gpt2, "gpt2 cannot be reloaded .*transposed"),
        (mixtral, "mixtral cannot be reloaded .*experts"),
    ],
)
def test_gptq_and_awq_of_what_does_not_reload_are_refused_and_bitsandbytes_is_not(tmp_path, make, said, target):
    make(tmp_path)
    with pytest.raises(UnsupportedFormat, match=rf"{target}-4bit: {said}.*; quantize to bitsandbytes$"):
        check(tmp_path, target)
    check(tmp_path, "nf4")
    check(tmp_path, "int8")


@pytest.mark.parametrize("target", ["gptq", "awq"])
def test_what_gptqmodel_alone_does_wrong_is_refused_for_it_alone(tmp_path, target):
    glm(tmp_path)
    check(tmp_path, target)
    said = rf"{target}-4bit: glm cannot be reloaded .*splits its fused layers.*; leave engine: gptqmodel out$"
    with pytest.raises(UnsupportedFormat, match=said):
        check(tmp_path, f"{target}:engine=gptqmodel")


@pytest.mark.parametrize("target", ["gptq:group_size=-1", "gptq:group_size=16,desc_act=true", "awq:group_size=16"])
def test_groups_whose_kernel_a_cpu_does_not_have_are_refused_where_there_is_no_cuda_device(
    tmp_path, monkeypatch, target
):
    tiny_llama(tmp_path / "llama", layers=1)
    monkeypatch.setattr(reloadable, "CUDA", tmp_path / "none")
    with pytest.raises(UnsupportedFormat, match=r"in 4 bits loads and cannot run\); choose 32, 64 or 128$"):
        check(tmp_path / "llama", target)
    check(tmp_path / "llama", "gptq:bits=8,group_size=-1")
    monkeypatch.setattr(reloadable, "CUDA", tmp_path)
    check(tmp_path / "llama", target)


@pytest.mark.parametrize("target", ["gptq", "awq", "nf4", "int8"])
def test_decoders_and_their_classifiers_are_let_through(tmp_path, target):
    check(tiny_llama(tmp_path / "llama", layers=1), target)
    check(tiny_head(tmp_path / "head", "LlamaForSequenceClassification"), target)
    check(tiny_head(tmp_path / "tags", "LlamaForTokenClassification"), target)


@pytest.mark.parametrize("kind", ["bloom", "gptj", "gpt_neox", "starcoder2"])
def test_awq_of_architectures_with_scaled_activations_is_let_through(tmp_path, kind):
    folder = tiny_llama(tmp_path, layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    check(folder, "gptq")
    check(folder, "awq")
    if kind == "bloom":
        check(folder, "gptq:engine=gptqmodel")
        with pytest.raises(UnsupportedFormat, match=r"awq-4bit: bloom .*layers one by one.*leave engine: gptqmodel"):
            check(folder, "awq:engine=gptqmodel")


W4A16, NEAREST = "compressed-tensors:group_size=32", "compressed-tensors:group_size=32,rounding=nearest"
FP8 = "compressed-tensors:scheme=fp8"


def of_type(folder, kind, **keys):
    """A Llama that says it is of another type."""
    tiny_llama(folder, layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": kind, **keys}))


@pytest.mark.parametrize("target", [W4A16, "compressed-tensors:scheme=w8a8", FP8])
def test_compressed_tensors_of_encoders_and_base_models_are_let_through(tmp_path, target):
    for number, architecture in enumerate(
        ("BertForSequenceClassification", "LlamaModel", "LlamaForTokenClassification")
    ):
        check(tiny_head(tmp_path / str(number), architecture), target)


@pytest.mark.parametrize(
    ("make", "said", "targets"),
    [
        (gpt2, "gpt2 cannot be reloaded .*transposed.*; quantize to bitsandbytes$", (W4A16, FP8)),
        (mixtral, "mixtral cannot be reloaded .*experts.*; quantize to bitsandbytes$", (W4A16, FP8)),
        (lambda f: of_type(f, "falcon"), r"falcon cannot be reloaded .*reads weights.*; use scheme fp8$", (W4A16,)),
        (lambda f: of_type(f, "gemma3"), r"rtn-w4a16: gemma3 cannot be reloaded .*; use scheme fp8$", (NEAREST,)),
        (
            lambda f: of_type(f, "bart", is_encoder_decoder=True),
            "bart cannot be calibrated .*; use scheme fp8, or rounding nearest$",
            (W4A16, "compressed-tensors:scheme=w8a8"),
        ),
    ],
)
def test_compressed_tensors_that_would_not_reload_is_refused_and_what_would_is_not(tmp_path, make, said, targets):
    make(tmp_path)
    for target in targets:
        with pytest.raises(UnsupportedFormat, match=said):
            check(tmp_path, target)
    if FP8 not in targets:
        check(tmp_path, FP8)


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    folder = tiny_llama(tmp_path, layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": True}))
    with pytest.raises(UnsupportedFormat, match="no decoder"):
        check(folder, "gptq")
