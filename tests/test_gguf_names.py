"""A GGUF file becomes the checkpoint that transformers would load from it, tensor by tensor."""

import json
import math

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer, GgufConfig

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, UnexpectedTensor, UnsupportedFormat
from pipeline.jobs import Job
from pipeline.stages import upcast as stage
from pipeline.upcasting.gguf import laid_out
from tests import gguf_models as models
from tests.checkpoints import tiny_tokenizer

KINDS = ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "F16")
LLAMA = models.LLAMA
QK = ("attn_q", "attn_k", "attn_v")
GEMMA_NORMS = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
GPT2 = {
    "block_count": 2, "context_length": 1024, "embedding_length": 64, "feed_forward_length": 256,
    "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5,
}  # fmt: skip
MOE = LLAMA | {"attention.key_length": 128, "expert_count": 4, "expert_used_count": 2}
SHARED = {
    "ffn_gate_inp_shexp": (256,), "ffn_gate_shexp": (5632, 256), "ffn_up_shexp": (5632, 256),
    "ffn_down_shexp": (256, 5632),
}  # fmt: skip
PLAIN = ("attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
# Architecture → its metadata, its tensors, their types. The experts' widths are transformers' defaults, which it
# takes whatever the file says.
FAMILIES = {
    "llama": (LLAMA, models.decoder(), KINDS),
    "qwen2": (LLAMA, models.decoder(tied=True, biases=QK), KINDS),
    "qwen3": (LLAMA, models.decoder(head=128, qk_norms=True), KINDS),
    "gemma2": (LLAMA | {"attention.key_length": 64}, models.decoder(norms=GEMMA_NORMS, tied=True), KINDS),
    "gemma3": (LLAMA | {"attention.key_length": 64}, models.decoder(norms=GEMMA_NORMS, qk_norms=True), KINDS),
    "phi3": (
        LLAMA,
        models.decoder(without=(*QK, "ffn_gate"), more={"attn_qkv": (512, 256), "ffn_up": (1024, 256)}),
        KINDS,
    ),
    "gpt2": (GPT2, models.gpt2(), ("Q8_0", "Q4_0")),
    "nemotron": (LLAMA, models.decoder(without=("ffn_gate",), biases=("attn_norm", "ffn_norm")), KINDS),
    "starcoder2": (
        LLAMA | {"attention.layer_norm_epsilon": 1e-5},
        models.decoder(without=("ffn_gate",), biases=PLAIN),
        KINDS,
    ),
    "lfm2": (LLAMA | {"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3}, models.lfm2(), KINDS),
    "qwen3moe": (
        MOE,
        models.decoder(head=128, qk_norms=True, without=models.DENSE_MLP, more=models.experts(768), layers=1),
        ("Q8_0", "Q4_K", "F16"),
    ),
    "qwen2moe": (
        MOE,
        models.decoder(biases=QK, without=models.DENSE_MLP, more=models.experts(1408) | SHARED, layers=1),
        ("Q8_0", "Q4_0"),
    ),
    # transformers itself cannot dequantize gates and ups of two types here
    "qwen35moe": (models.QWEN35MOE, models.qwen35moe(), ("Q8_0",)),
}


def upcast(path, out):
    """The dense float32 checkpoint of a GGUF file, its class, its pieces and what was dropped."""
    checkpoint = Checkpoint.open(path)
    with laid_out(checkpoint, dtype=torch.float32) as layout:
        if layout.problems:
            raise layout.problems[0]
    (output,) = stage.run(Job(inputs={"source": path}, options={"dtype": "float32"}, workspace=out.parent))
    if out != output.folder:
        output.folder.rename(out)
    config = transformers.AutoConfig.from_pretrained(out)
    return getattr(transformers, config.architectures[0]), layout.pieces, layout.dropped


def reload(kind, folder):
    model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.state_dict()


def write(path, family, **options):
    numbers, shapes, kinds = FAMILIES[family]
    if family in {"qwen2moe", "qwen3moe"}:
        numbers = numbers | {"block_count": 1}
    return models.write(path, family, numbers, shapes, kinds=kinds, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_reloads_whole_and_is_what_transformers_loads_from_the_file(family, tmp_path):
    path = write(tmp_path / "m.gguf", family)
    kind, made, dropped = upcast(path, tmp_path / "out")
    ours = reload(kind, tmp_path / "out")
    dequantized = {"quantization_config": GgufConfig(dequantize=True)} if family in {"lfm2", "qwen35moe"} else {}
    theirs = kind.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32, **dequantized).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert dropped == ({"blk.4.nextn.eh_proj.weight": "the architecture ignores it"} if family == "qwen35moe" else {})
    used = {piece.group.dense_name for piece in made}
    assert len({piece.name for piece in made}) == len(made) >= len(used)


def test_experts_become_one_tensor_each_that_needs_no_arithmetic_and_no_copy(tmp_path):
    path = write(tmp_path / "m.gguf", "qwen3moe")
    _, made, _ = upcast(path, tmp_path / "out")
    found = {piece.name: piece for piece in made}
    for i in range(4):
        piece = found[f"model.layers.0.mlp.experts.{i}.up_proj.weight"]
        assert (piece.shape, piece.finish) == ((768, 256), None)


def test_a_llamas_queries_and_keys_are_put_back_in_order(tmp_path):
    """llama.cpp lays rotary halves one beside the other: row 2i of a head was row i, row 2i + 1 was row 32 + i."""
    rows = np.arange(128, dtype=np.float32)[:, None].repeat(256, axis=1)
    path = models.tiny_llama_gguf(tmp_path / "m.gguf", values={"blk.0.attn_k.weight": rows})
    kind, _, _ = upcast(path, tmp_path / "out")
    column = reload(kind, tmp_path / "out")["model.layers.0.self_attn.k_proj.weight"][:, 0]
    assert column[:4].tolist() == [0.0, 2.0, 4.0, 6.0]
    assert column[32:36].tolist() == [1.0, 3.0, 5.0, 7.0]


@pytest.mark.parametrize("tied", [True, False])
def test_a_split_model_becomes_what_the_same_model_in_one_file_becomes(tied, tmp_path):
    one, parts = tmp_path / "one", tmp_path / "parts"
    one.mkdir()
    parts.mkdir()
    first = models.tiny_llama_gguf(one / "m.gguf", tied=tied)
    part = models.tiny_llama_gguf(parts / "m.gguf", tied=tied, split=8)
    assert len(Checkpoint.open(part).shards) == 3
    kind, _, _ = upcast(first, tmp_path / "a")
    upcast(part, tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    reload(kind, tmp_path / "b")


def test_config_tokenizer_and_generation_config_come_from_the_file(tmp_path):
    upcast(models.tiny_llama_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "out"), tiny_tokenizer()
    for text in ("the rain in an inn", "Grüße, 世界!\n\ttab", "<s>a</s>"):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == text
    assert (ours.pad_token_id, ours.bos_token_id, ours.eos_token_id) == (0, 1, 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 2
    written = "".join(file.read_text() for file in (tmp_path / "out").glob("*.json"))
    assert str(tmp_path) not in written


def llama3_factors(theta=10000.0, dim=64, factor=8.0):
    """As convert_hf_to_gguf.py makes them from Llama 3.1's config."""
    made = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * theta ** (i / dim)
        smooth = min(max((8192 / wavelength - 1) / 3, 0.0), 1.0)
        made.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(made, np.float32)


def scaled(tmp_path, numbers=None, tensors=None):
    shapes = models.decoder() | {name: value.shape for name, value in (tensors or {}).items()}
    path = models.write(tmp_path / "m.gguf", "llama", LLAMA | (numbers or {}), shapes, values=tensors)
    kind, _, dropped = upcast(path, tmp_path / "out")
    reload(kind, tmp_path / "out")
    return json.loads((tmp_path / "out" / "config.json").read_text())["rope_parameters"], dropped


def test_llama_3s_rotary_factors_come_back_as_its_config(tmp_path):
    rope, dropped = scaled(tmp_path, tensors={"rope_freqs.weight": llama3_factors()})
    assert rope == {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert dropped == {"rope_freqs.weight": "config.json says the same as rope_parameters"}


def test_other_rotary_factors_are_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match=r"scales positions in another way than Llama 3\.1"):
        scaled(tmp_path, tensors={"rope_freqs.weight": np.linspace(1, 9, 32, dtype=np.float32)})


def test_named_rotary_scaling_is_kept(tmp_path):
    numbers = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
    rope, _ = scaled(tmp_path, numbers)
    assert rope == {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128
    }  # fmt: skip


def test_long_rotary_factors_come_back_as_longrope(tmp_path):
    short, long = np.ones(32, np.float32), np.linspace(1, 8, 32, dtype=np.float32)
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    rope, dropped = scaled(tmp_path, {"rope.scaling.original_context_length": 128}, tensors)
    assert (rope["rope_type"], rope["original_max_position_embeddings"]) == ("longrope", 128)
    assert (rope["long_factor"], rope["short_factor"]) == (long.tolist(), short.tolist())
    assert len(dropped) == 2


def test_unknown_rotary_scaling_is_refused(tmp_path):
    with pytest.raises(UnsupportedFormat, match="rope scaling spiral"):
        scaled(tmp_path, {"rope.scaling.type": "spiral"})


@pytest.mark.parametrize(
    ("architecture", "numbers", "shapes", "error", "said"),
    [
        # transformers loads a Mixtral from GGUF as a Llama whose feed-forward is random, without an exception
        (
            "llama",
            LLAMA | {"expert_count": 4},
            models.decoder(without=models.DENSE_MLP, more=models.experts(512)),
            UnexpectedTensor,
            "blk.0.ffn_gate_inp.weight: transformers has no place for it in a llama",
        ),
        (
            "llama",
            LLAMA,
            models.decoder() | {"blk.9.attn_q.weight": (256, 256)},
            UnexpectedTensor,
            "blk.9.attn_q.weight",
        ),
        ("llama", LLAMA | {"embedding_length": 512}, models.decoder(), CheckpointError, "token_embd.weight: gives"),
        (
            "llama",
            LLAMA | {"attention.head_count_kv": 3},
            models.decoder(),
            CheckpointError,
            r"blk.0.attn_k.weight: has shape \[128, 256\], from which transformers cannot make",
        ),
        (
            "qwen2",
            LLAMA | {"block_count": 2**32 - 1},
            models.decoder(),
            CheckpointError,
            "qwen2.block_count is 4294967295, but it holds 21 tensors",
        ),
        ("zebra", LLAMA, models.decoder(), CheckpointError, "architecture zebra: GGUF model with architecture zebra"),
        (
            "qwen3moe",
            MOE,
            {name: shape for name, shape in FAMILIES["qwen3moe"][1].items() if name != "blk.0.ffn_up_exps.weight"},
            MissingTensor,
            "blk.0.ffn_gate_exps.weight is there, but not the tensor that it is joined with",
        ),
    ],
)
def test_what_has_no_place_or_does_not_fit_is_refused(architecture, numbers, shapes, error, said, tmp_path):
    path = models.write(tmp_path / "m.gguf", architecture, numbers, shapes)
    with pytest.raises(error, match=said):
        upcast(path, tmp_path / "out")


def test_a_file_without_a_tokenizer_is_refused(tmp_path):
    path = models.tiny_llama_gguf(tmp_path / "m.gguf", tokenizer=False)
    with pytest.raises(CheckpointError, match=r"m.gguf: transformers cannot make a config and a tokenizer"):
        upcast(path, tmp_path / "out")


def test_the_table_of_names_is_made_once_for_a_model_and_not_for_each_of_its_modules(tmp_path, monkeypatch):
    """Each takes as long as the model is deep: 40 layers would take a minute."""
    made = []
    make = gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *which: made.append(which) or make(*which))
    upcast(models.tiny_llama_gguf(tmp_path / "m.gguf"), tmp_path / "out")
    assert len(made) == 2, "once here for the layout that is looked at, once for the stage"
