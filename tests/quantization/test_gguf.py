"""A GGUF file holds the model: for gguf's own reader, for transformers, and for an upcast of it."""

import json
import shutil
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from pipeline import progress
from pipeline.catalog import DENSE, FORMATS
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, NonFinite, UnsupportedFormat
from pipeline.evaluation.load import load_model
from pipeline.evaluation.tasks import Comparison
from pipeline.gguf_shards import GGUFReader
from pipeline.inspection import inspect
from pipeline.jobs import Job
from pipeline.judging.compare import compare
from pipeline.plan import make_plan
from pipeline.quantization import gguf as writer
from pipeline.quantization.folder import Order
from pipeline.quantization.writers import check
from pipeline.recipe import parse_recipe
from pipeline.reloadable import check_reload
from pipeline.sections import Data
from pipeline.sizes import dense_sizes
from pipeline.stages import quantize, upcast
from pipeline.targets import GGUFTarget
from tests import gguf_models
from tests.checkpoints import BOS, CHAT_TEMPLATE, EOS, PAD, tiny_llama, tiny_tokenizer, with_chat_template

Q8, Q4 = GGUFTarget(format="gguf"), GGUFTarget(format="gguf", type="q4_0")
TEXTS = ("the rain in an inn", "Grüße, 世界!\n\ttab  two", "<s>a</s> 12345", "  they're here", "")
SIZES = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama with a wide head": (LlamaForCausalLM, LlamaConfig(**SIZES, head_dim=64)),
    "llama, tied": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama 3": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, rope_parameters=YARN)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=128)),
}


def model_in(folder: Path, name: str) -> Path:
    kind, config = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
        for parameter in model.parameters():  # biases begin as zeros, and norms as ones
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def order(folder: Path, dense: Path, target: GGUFTarget = Q8) -> Order:
    return Order(dense=dense, out=folder / "out", scratch=folder / "scratch", target=target)


def upcasted(source: Path, workspace: Path) -> Path:
    (output,) = upcast.run(Job(inputs={"source": source}, options={"dtype": "float32"}, workspace=workspace))
    return output.folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 67)[None]).logits.float()


def alone(path: Path, folder: Path) -> Path:
    """The file in a folder of its own, where nothing beside it can be read."""
    folder.mkdir()
    return Path(shutil.copy(path, folder))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module", params=[Q8, Q4], ids=lambda target: target.type)
def made(request, dense, tmp_path_factory):
    """The folder of a target, and what the writer said of it."""
    one = order(tmp_path_factory.mktemp(request.param.type), dense, request.param)
    return one, writer.write(one)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_comes_back_with_its_own_weights_and_logits(name, tmp_path):
    dense = model_in(tmp_path / "dense", name)
    one = order(tmp_path, dense)
    writer.write(one)
    folder = upcasted(one.out, tmp_path / "upcast")
    before, after = load_file(dense / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    for key, weight in before.items():
        if weight.ndim == 1:
            assert torch.equal(after[key], weight.float()), key
            continue
        blocks = weight.float().reshape(-1, 32)
        # Half a step, and float16's rounding of the step, at the largest code.
        bound = blocks.abs().amax(-1, keepdim=True) / 127 * (0.5 + 127 * 2**-11 + 1e-3)
        assert ((after[key].reshape(-1, 32) - blocks).abs() <= bound).all(), key
    exact = logits(AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32))
    ours = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert (ours - exact).norm() <= 0.06 * exact.norm()  # rounding to 8 bits; rows in another order give more than 1
    assert torch.allclose(logits(load_model(one.out)), ours, atol=1e-5)


def test_transformers_loads_the_file_by_itself_to_the_logits_of_its_upcast(made, tmp_path):
    one, _ = made
    folder = upcasted(one.out, tmp_path / "upcast")
    ours = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    for where in (one.out, alone(next(one.out.glob("*.gguf")), tmp_path / "alone").parent):
        (path,) = where.glob("*.gguf")
        theirs = AutoModelForCausalLM.from_pretrained(where, gguf_file=path.name, dtype=torch.float32)
        assert torch.allclose(logits(theirs), ours, atol=1e-5)


def test_ggufs_own_reader_gives_the_weights_that_ours_gives(made):
    one, _ = made
    (path,) = one.out.glob("*.gguf")
    checkpoint = Checkpoint.open(one.out)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert theirs.keys() == checkpoint.tensors.keys()
    with GGUFReader(checkpoint) as reader:
        for name, tensor in theirs.items():
            group = reader.group(name)
            ours = writer.layout.dequantize(group, checkpoint.quantization) if group.packed else group.tensors["weight"]
            assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), ours.numpy()), name


def test_matrices_take_the_type_the_head_is_never_less_than_q8_0_and_the_rest_stays_float32(made):
    one, written = made
    kind = one.target.type.upper()
    types = {name: info.dtype for name, info in Checkpoint.open(one.out).tensors.items()}
    assert list(types)[:3] == ["token_embd.weight", "output_norm.weight", "output.weight"]
    assert list(types)[3:6] == ["blk.0.attn_norm.weight", "blk.0.attn_q.weight", "blk.0.attn_k.weight"]
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    assert types["output.weight"] == "Q8_0"
    assert {types[name] for name in types if "norm" not in name and name != "output.weight"} == {kind}
    assert len(written.packed) == 16
    assert (4.5 if kind == "Q4_0" else 8.5) <= written.packed_bits_per_weight <= 8.5


def test_a_tied_embedding_is_the_head_and_takes_its_type(tmp_path):
    one = order(tmp_path, tiny_llama(tmp_path / "dense", tied=True), Q4)
    writer.write(one)
    tensors = Checkpoint.open(one.out).tensors
    assert "output.weight" not in tensors
    assert tensors["token_embd.weight"].dtype == "Q8_0"


def test_the_rows_of_queries_and_keys_lie_as_llama_cpp_rotates_them(dense, made):
    """Rotated pairs lie one after the other there, half a head apart in transformers (four heads, two for keys)."""
    one, _ = made
    checkpoint = Checkpoint.open(one.out)
    weights = load_file(dense / "model.safetensors")
    with GGUFReader(checkpoint) as reader:
        for part, name, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
            found = writer.layout.dequantize(reader.group(f"blk.0.{part}.weight"), checkpoint.quantization)
            weight = weights[f"model.layers.0.self_attn.{name}.weight"].float()
            rows = [
                head * 32 + half * 16 + i for head in range(heads) for i in range(16) for half in (0, 1)
            ]  # fmt: skip
            step = weight.abs().max() / (127 if one.target.type == "q8_0" else 8)
            assert (found - weight[rows]).abs().max() <= step
            assert (found - weight).abs().max() > step


def test_the_same_weights_give_the_same_bytes(dense, made, tmp_path):
    one, _ = made
    again = order(tmp_path, Path(shutil.copytree(dense, tmp_path / "elsewhere")), one.target)
    writer.write(again)
    for path in one.out.iterdir():
        assert (again.out / path.name).read_bytes() == path.read_bytes(), path.name


def test_config_and_tokenizer_lie_beside_the_file(dense, made):
    one, _ = made
    names = {path.name for path in one.out.iterdir()}
    assert names == {path.name for path in dense.iterdir()} - {"model.safetensors"} | {
        f"model-{one.target.type.upper()}.gguf"
    }
    assert json.loads((one.out / "config.json").read_text()) == json.loads((dense / "config.json").read_text())


def test_the_chat_template_and_the_special_tokens_go_along(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    one = order(tmp_path, with_chat_template(tmp_path / "dense"))
    writer.write(one)
    fields = gguf.GGUFReader(one.out / "model-Q8_0.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == CHAT_TEMPLATE
    found = [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("padding", "bos", "eos")]
    assert found == [0, 1, 2]


def spm(folder: Path, *, prepend: bool) -> PreTrainedTokenizerFast:
    """A tokenizer as SentencePiece's BPE is converted to: spaces as ▁, and bytes for what is no token."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz,.'"]
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("i", "n"), ("▁", "in"), ("a", "n"), ("▁", "a"), ("r", "e")]
    made = [left + right for left, right in merges]
    tokens = ["<unk>", BOS, EOS, *(f"<0x{i:02X}>" for i in range(256)), *made, *pieces]
    core = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)}, merges=merges, unk_token="<unk>", byte_fallback=True,
            fuse_unk=True,
        )
    )  # fmt: skip
    core.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prepend else []), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token=BOS, eos_token=EOS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def bpe(folder: Path, before: pre_tokenizers.PreTokenizer, *, whole: bool = False, bos: bool = False) -> Path:
    """The tiny tokenizer, splitting text in another way."""
    tokenizer = tiny_tokenizer()
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = before
    core.model.ignore_merges = whole
    if bos:
        core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS).save_pretrained(folder)
    return folder


def split(name: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
OTHER = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), BYTES])


@pytest.mark.parametrize(
    ("before", "whole", "bos", "name"),
    [
        (BYTES, False, False, "gpt-2"),
        (BYTES, False, True, "gpt-2"),
        (split("llama-bpe"), True, True, "llama-bpe"),
        (split("llama-bpe"), False, False, "smaug-bpe"),
        (split("qwen2"), False, False, "qwen2"),
        (split("tekken"), True, False, "tekken"),
    ],
)
def test_the_tokenizer_in_the_file_gives_the_tokens_of_the_original(before, whole, bos, name, dense, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    bpe(tmp_path / "dense", before, whole=whole, bos=bos)
    one = order(tmp_path, tmp_path / "dense")
    assert writer.write(one).notes == {"tokenizer_pre": name}
    path = alone(one.out / "model-Q8_0.gguf", tmp_path / "alone")
    ours = AutoTokenizer.from_pretrained(tmp_path / "dense")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert theirs(text).input_ids == ours(text).input_ids, text
        assert theirs.decode(ours(text).input_ids) == ours.decode(ours(text).input_ids)
    metadata = gguf.GGUFReader(path).fields
    assert bool(metadata["tokenizer.ggml.add_bos_token"].contents()) == bos
    assert metadata["tokenizer.ggml.pre"].contents() == name


def test_sentencepieces_bpe_keeps_its_tokens_and_the_order_in_which_they_are_joined(tmp_path):
    ours = spm(tiny_llama(tmp_path / "dense", vocab=320), prepend=True)
    one = order(tmp_path, tmp_path / "dense")
    writer.write(one)
    path = alone(one.out / "model-Q8_0.gguf", tmp_path / "alone")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("the inn, there", "an answer in the rain", "Ünïcode 12"):
        assert theirs(text).input_ids == ours(text).input_ids, text
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.model"].contents() == "llama"
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[:4] == [2, 3, 3, 6]


@pytest.mark.parametrize("before", [OTHER, split("tekken")], ids=["other", "tekken without whole words"])
def test_a_pre_tokenizer_that_llama_cpp_has_no_name_for_is_said(before, dense, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    bpe(tmp_path / "dense", before)
    heard = []
    with progress.shown_by(heard.append):
        notes = writer.write(order(tmp_path, tmp_path / "dense")).notes
    assert notes["tokenizer_pre"] == "default"
    assert "llama.cpp knows no such pre-tokenizer" in notes["tokenizer"]
    assert any("llama.cpp knows no such pre-tokenizer" in str(event) for event in heard)


def test_digits_by_themselves_have_a_name_in_llama_cpp_that_transformers_does_not_know(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    bpe(tmp_path / "dense", DIGITS)
    assert writer.write(order(tmp_path, tmp_path / "dense")).notes["tokenizer_pre"] == "smollm"


def configured(dense: Path, folder: Path, **changes: object) -> Checkpoint:
    shutil.copytree(dense, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "model_type gpt2 is not written to GGUF, only llama, mistral, qwen2, qwen3"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is no causal language model, and its head"),
        ({"hidden_act": "gelu"}, "config.json has hidden_act gelu, but readers of a GGUF llama take it as silu"),
        ({"attention_bias": True}, "config.json has attention_bias True"),
        ({"model_type": "mistral", "sliding_window": 64}, "config.json has sliding_window 64"),
        ({"model_type": "qwen3", "head_dim": 32}, "config.json has head_dim 32"),
        ({"model_type": "qwen2", "head_dim": 64}, "config.json has head_dim 64"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type dynamic is not written"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}},
            "beta_fast, for which GGUF has no",
        ),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "low_freq_factor 2.0"),
    ],
)
def test_what_a_gguf_file_cannot_say_is_refused_before_anything_is_written(changes, said, dense, tmp_path):
    with pytest.raises(UnsupportedFormat, match=said):
        check(configured(dense, tmp_path / "dense", **changes), [Q8])


def test_rows_that_do_not_divide_into_blocks_are_refused_by_name(tmp_path):
    folder = tiny_llama(tmp_path / "dense", intermediate=72)
    with pytest.raises(UnsupportedFormat, match=r"the 72 inputs of model.layers.0.mlp.down_proj are no multiple of"):
        check(Checkpoint.open(folder), [Q8])


def test_a_projector_beside_the_model_is_refused(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    (tmp_path / "dense" / "projector.json").write_text("{}")
    with pytest.raises(UnsupportedFormat, match="projector beside the model has no place"):
        check(Checkpoint.open(tmp_path / "dense"), [Q8])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw["model"].update(type="Unigram"), "its model is Unigram"),
        (lambda raw: raw.update(normalizer={"type": "Lowercase"}), r"it normalizes text \(Lowercase\)"),
        (lambda raw: raw["pre_tokenizer"].update(add_prefix_space=True), "it puts a space before every text"),
        (lambda raw: raw.update(pre_tokenizer={"type": "Whitespace"}), "neither byte-level nor SentencePiece's"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_no_like_of_is_refused(change, said, dense, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    path = tmp_path / "dense" / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(UnsupportedFormat, match=said):
        check(Checkpoint.open(tmp_path / "dense"), [Q8])


@pytest.mark.parametrize("text", ['{"model": []}', '{"model": {"type": "BPE"}, "pre_tokenizer": [{}]}'])
def test_a_tokenizer_json_that_is_none_is_refused(text, dense, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text(text)
    with pytest.raises((CheckpointError, UnsupportedFormat), match="tokenizer"):
        check(Checkpoint.open(tmp_path / "dense"), [Q8])


def test_a_model_without_tokenizer_json_is_refused(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedFormat, match=r"has no tokenizer\.json"):
        check(Checkpoint.open(tmp_path / "dense"), [Q8])


def test_tokens_without_a_row_in_the_embedding_are_refused_and_rows_without_a_token_filled_up(tmp_path):
    one = order(tmp_path / "more", tiny_llama(tmp_path / "wide", vocab=320))
    writer.write(one)
    tokens = gguf.GGUFReader(one.out / "model-Q8_0.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert tokens[254:257] == [tokens[254], "[PAD255]", "[PAD256]"]
    assert len(tokens) == 320
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"extra{i}" for i in range(9)])
    folder = tiny_llama(tmp_path / "narrow")
    tokenizer.save_pretrained(folder)
    with pytest.raises(UnsupportedFormat, match="has a token 263, but the model's embedding 256 rows"):
        writer.write(order(tmp_path / "less", folder))
    assert not (tmp_path / "less" / "out").exists()


def test_a_weight_that_is_no_number_is_refused_by_name_and_nothing_is_left(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "dense")
    weights = {name: tensor.clone() for name, tensor in load_file(dense / "model.safetensors").items()}
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    one = order(tmp_path, tmp_path / "dense")
    with pytest.raises(NonFinite, match=r"model.layers.1.mlp.up_proj.weight"):
        writer.write(one)
    assert not one.out.exists()


def rows(path: Path, **row: str) -> Path:
    text = [json.dumps({"text": f"the sum of {i} and {i + 1} is in an inn"} | row) + "\n" for i in range(40)]
    path.write_text("".join(text))
    return path


def test_a_target_of_a_recipe_is_judged_beside_the_dense_model_and_can_be_a_source_again(dense, tmp_path):
    job = Job(
        inputs={"dense": dense},
        options={"targets": [Q8.model_dump()], "seed": 0, "calibration": {"samples": 1, "sequence_length": 8}},
        workspace=tmp_path,
    )
    (output,) = quantize.run(job)
    assert output.variant == "gguf-q8_0"
    assert output.notes == {"dense": [], "tokenizer_pre": "gpt-2"}
    scores = compare(
        Comparison(
            variant=output.variant, path=output.folder, reference="dense", reference_path=dense,
            data=Data(path=str(rows(tmp_path / "rows.jsonl"))), sequence_length=64,
        )
    )  # fmt: skip
    assert 0 < scores.kl_divergence < 1e-3
    facts = inspect(Checkpoint.open(output.folder))
    assert (facts.format, facts.bits, facts.problems) == ("GGUF", {8: 16}, ())
    assert facts.becomes["gguf-q8_0"] == ""
    sizes = dense_sizes(Checkpoint.open(dense), DENSE)
    assert sizes.quantized_bytes(Q8, "bfloat16") == Checkpoint.open(output.folder).nbytes


RECIPE = """
name: bot
source: {source}
train: {{method: {method}, data: {rows}}}
quantize: [{{format: gguf, type: q4_0}}]
store: {store}
"""


@pytest.mark.parametrize(
    ("method", "row", "said"),
    [
        ("none", {}, None),
        ("lora", {}, None),
        ("head", {"label": "a"}, "head or projector that learns from classification rows has no place in a GGUF file"),
        ("lora", {"label": "a"}, "head or projector that learns from classification rows has no place in a GGUF file"),
    ],
)
def test_the_plan_refuses_what_training_would_put_on_the_model(method, row, said, dense, tmp_path, monkeypatch):
    monkeypatch.setenv("REQUANT_CACHE", str(tmp_path / "cache"))
    text = RECIPE.format(
        source=dense, method=method, rows=rows(tmp_path / "rows.jsonl", **row), store=tmp_path / "store"
    )
    recipe = parse_recipe(text, where="r.yaml", overrides=())
    if said is None:
        assert make_plan(recipe).step("quantize").outputs[0].variant == "gguf-q4_0"
        return
    with pytest.raises(UnsupportedFormat, match=said):
        make_plan(recipe)


@pytest.mark.parametrize(("architecture", "refused"), [("llama", False), ("gemma2", True)])
def test_a_gguf_source_can_become_gguf_again_where_its_architecture_is_written(architecture, refused, tmp_path):
    path = gguf_models.write(tmp_path / "m.gguf", architecture, gguf_models.LLAMA, gguf_models.decoder())
    checkpoint = Checkpoint.open(path)
    check_it = partial(check_reload, checkpoint, dense_sizes(checkpoint, FORMATS["gguf"]), Q4)
    if not refused:
        check_it()
        return
    with pytest.raises(UnsupportedFormat, match="architecture gemma2 is not written, only llama, qwen2, qwen3"):
        check_it()
