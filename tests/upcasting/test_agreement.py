"""A dense model that says what its packed source says passes --verify, and another does not."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from pipeline import by_hand
from pipeline.errors import InputError, ReloadMismatch
from pipeline.jobs import Job
from pipeline.upcasting.agreement import FLOOR, Question
from tests.architectures import ARCHITECTURES
from tests.checkpoints import tiny_tokenizer
from tests.gguf_models import tiny_llama_gguf
from tests.packed_models import configure, pack, saved, store, stored, upcast

EXAMPLE = Path(__file__).parents[2] / "examples" / "stdlib-lm-awq"  # trained: what it says is far from even
MODULE = "model.layers.2.mlp.down_proj"
ACTIVATIONS = {"nf4": "", "int8": "int8", "W8A8": "int8 even", "W8A8 by tensor": "int8 by tensor"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return upcast(EXAMPLE, tmp_path_factory.mktemp("dense"), dtype="bfloat16").folder


@pytest.fixture(scope="module", params=ACTIVATIONS)
def made(request, dense, tmp_path_factory):
    """A packed source, its answer, and what it becomes."""
    folder = tmp_path_factory.mktemp("packed")
    source = folder / "source"
    if request.param.startswith("W8A8"):
        with_activations(dense, source, by_tensor="tensor" in request.param)
    else:
        config = transformers.BitsAndBytesConfig(load_in_4bit=request.param == "nf4",
                                                 load_in_8bit=request.param == "int8")  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
        model.save_pretrained(source)
        transformers.AutoTokenizer.from_pretrained(dense).save_pretrained(source)
    question = Question.ask(source)
    return request.param, question, upcast(source, folder, dtype="bfloat16").folder


def copy(folder, to):
    shutil.copytree(folder, to, dirs_exist_ok=True)


def with_activations(dense, source, *, by_tensor):
    """The dense model in compressed-tensors' 8-bit integers, inputs too."""
    copy(dense, source)
    tensors, linear = stored(source), {}
    for name in [name for name in tensors if "proj" in name]:
        weight = tensors.pop(name).float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        linear[name] = (weight / scale).round().to(torch.int8)
        linear[f"{name}_scale"] = scale.bfloat16()
        if by_tensor:
            linear[f"{name.removesuffix('weight')}input_scale"] = torch.tensor([0.1], dtype=torch.bfloat16)
    store(source, tensors | linear)
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    given = {**eight, "strategy": "tensor" if by_tensor else "token", "dynamic": not by_tensor}
    configure(source, quantization_config={
        "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {
            "targets": ["Linear"], "weights": {**eight, "strategy": "channel"}, "input_activations": given,
        }},
    })  # fmt: skip


class TestAgreement:
    """The bound is what the format's own rounding does to the dense model."""

    def test_the_same_model_in_another_format_passes(self, made):
        name, question, folder = made
        found = question.compare(folder)
        assert 0 <= found.kl_divergence <= found.bound < 0.05
        assert found.tokens == question.tokens.shape[1] > 200
        assert question.activations == ACTIVATIONS[name]

    def test_one_with_the_rows_of_a_module_in_another_order_does_not(self, made, tmp_path):
        _, question, folder = made
        copy(folder, tmp_path)
        tensors = stored(tmp_path)
        tensors[f"{MODULE}.weight"] = tensors[f"{MODULE}.weight"].roll(1, 0)
        store(tmp_path, tensors)
        with pytest.raises(ReloadMismatch, match=r"more than the .* that rounding explains"):
            question.compare(tmp_path)

    def test_one_that_says_nan_does_not(self, dense, tmp_path):
        question = Question.ask(dense)
        copy(dense, tmp_path)
        tensors = stored(tmp_path)
        tensors["model.norm.weight"][3] = torch.nan
        store(tmp_path, tensors)
        with pytest.raises(ReloadMismatch, match="KL divergence of nan"):
            question.compare(tmp_path)

    def test_a_dense_source_agrees_with_itself(self, dense):
        assert Question.ask(dense, text="def f(x):").compare(dense).kl_divergence == 0

    def test_awq(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")
        question = Question.ask(EXAMPLE)
        found = question.compare(upcast(EXAMPLE, tmp_path, dtype="bfloat16").folder)
        assert 0 < found.kl_divergence <= found.bound < 0.05


class TestArchitectures:
    """Whatever gives logits for token ids can be asked, by the class that config.json names."""

    @pytest.mark.parametrize(
        ("name", "keys"),
        [
            ("a sequence classifier", {}),
            ("a sequence classifier", {"num_labels": 1}),
            ("a token classifier", {}),
            ("bert", {}),
            ("roberta", {"max_position_embeddings": 66, "pad_token_id": 1}),
            ("t5", {}),
            ("gpt-2", {}),
        ],
    )
    def test_it_is_asked_and_told_from_another(self, name, keys, tmp_path):
        architecture = ARCHITECTURES[name]
        architecture = replace(architecture, keys={**architecture.keys, "vocab_size": 256, **keys})
        architecture.build().save_pretrained(tmp_path / "dense")
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
        kind = getattr(transformers, architecture.model)
        kind.from_pretrained(tmp_path / "dense", quantization_config=config).save_pretrained(tmp_path / "source")
        tiny_tokenizer().save_pretrained(tmp_path / "source")
        question = Question.ask(tmp_path / "source")
        output = upcast(tmp_path / "source", tmp_path)
        assert output.metrics["dequantized"] > 0
        assert question.logits.ndim == 2
        assert question.logits.shape[0] > 1
        question.compare(output.folder)
        architecture.build(seed=1).save_pretrained(output.folder)
        with pytest.raises(ReloadMismatch):
            question.compare(output.folder)

    @pytest.mark.parametrize("kind", ["Q8_0", "F16"])
    def test_a_gguf_file(self, kind, tmp_path):
        source = tiny_llama_gguf(tmp_path / "model.gguf", kinds=(kind,))
        question = Question.ask(source)
        folder = upcast(source, tmp_path, dtype="float32").folder
        assert question.compare(folder).kl_divergence <= FLOOR
        tensors = stored(folder)
        name = "model.layers.0.mlp.down_proj.weight"
        store(folder, {**tensors, name: tensors[name].roll(1, 0)})
        with pytest.raises(ReloadMismatch):
            question.compare(folder)


class TestRefused:
    """What cannot be asked is a sentence, before anything is written."""

    @pytest.mark.parametrize(
        ("name", "keys", "said"),
        [
            ("a vision transformer", {}, "ViTForImageClassification takes no token ids; leave out --verify"),
            ("bert", {"architectures": ["BertModel"]}, "BertModel has no logits; leave out --verify"),
        ],
    )
    def test_a_model_that_gives_no_logits_for_tokens(self, name, keys, said, tmp_path):
        ARCHITECTURES[name].build().save_pretrained(tmp_path)
        configure(tmp_path, **keys)
        with pytest.raises(InputError, match=said):
            Question.ask(tmp_path)

    def test_a_source_that_transformers_cannot_load(self, tmp_path):
        architecture = ARCHITECTURES["llama, tied"]
        architecture = replace(architecture, keys={**architecture.keys, "vocab_size": 256})
        model = saved(architecture, tmp_path / "source")
        pack(tmp_path / "source", model, dense=architecture.dense)
        tiny_tokenizer().save_pretrained(tmp_path / "source")
        tensors = stored(tmp_path / "source")
        renamed = {name.replace("model.", "model.none."): tensor for name, tensor in tensors.items()}
        configure(tmp_path / "source", quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
        store(tmp_path / "source", renamed)
        (tmp_path / "work").mkdir()
        job = Job(inputs={"source": tmp_path / "source"}, options={"dtype": "float32"}, workspace=tmp_path / "work")
        with pytest.raises(InputError, match=r"transformers cannot run it here .*; leave out --verify"):
            by_hand.move("upcast", job, tmp_path / "out", False, "")  # noqa: FBT003
        assert not (tmp_path / "out").exists()
        assert not list((tmp_path / "work").iterdir())

    def test_a_text_of_no_tokens(self, dense):
        with pytest.raises(InputError, match="makes no token of the text"):
            Question.ask(dense, text="")
