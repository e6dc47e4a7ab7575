"""Whatever the architecture, what comes back is the model itself: every tensor, and what it computes."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, UnexpectedTensor
from tests.architectures import ARCHITECTURES
from tests.packed_models import PACKERS, check_same, configure, pack, reloaded, saved, store, stored, upcast

LAYOUTS = {"gptq": "float32", "fp8": "bfloat16", "compressed-tensors": "float16"}
# Names and shapes do not depend on the layout: every architecture in GPTQ, and in one of the others.
CASES = [(name, "gptq") for name in ARCHITECTURES]
CASES += [(name, ("fp8", "compressed-tensors")[i % 2]) for i, name in enumerate(ARCHITECTURES)]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_packed_model_comes_back_as_it_was(name, layout, tmp_path):
    architecture = ARCHITECTURES[name]
    model = saved(architecture, tmp_path / "source")
    modules = pack(tmp_path / "source", model, dense=architecture.dense, layout=layout)
    output = upcast(tmp_path / "source", tmp_path, dtype=LAYOUTS[layout])
    assert output.metrics["dequantized"] == len(modules) > 0
    assert output.notes["dropped"] == {}
    again = reloaded(output.folder, architecture.model)
    on_disk = {tensor.dtype for tensor in load_file(output.folder / "model.safetensors").values()}
    assert {tensor.dtype for tensor in again.state_dict().values()} == on_disk
    check_same(model, reloaded(output.folder, architecture.model, dtype=torch.float32), architecture.inputs)


@pytest.mark.parametrize(
    ("name", "dtype", "wide"),
    [
        ("t5", "float16", r"\.wo\.weight"),
        ("t5", "bfloat16", None),
        ("deepseek-v3", "bfloat16", "e_score_correction_bias"),
        ("deberta", "bfloat16", r"(q|v)_bias|in_proj\.bias"),
    ],
)
def test_what_an_architecture_keeps_in_float32_stays_so(name, dtype, wide, tmp_path):
    model = saved(ARCHITECTURES[name], tmp_path / "source")
    pack(tmp_path / "source", model, dense=ARCHITECTURES[name].dense)
    after = load_file(upcast(tmp_path / "source", tmp_path, dtype=dtype).folder / "model.safetensors")
    kept = {key for key, tensor in after.items() if tensor.dtype == torch.float32}
    expected = {key for key, tensor in reloaded(tmp_path / "out", ARCHITECTURES[name].model).state_dict().items()
                if tensor.dtype == torch.float32}  # fmt: skip
    assert kept == expected
    assert bool(kept) == (wide is not None)


class TestBitsAndBytes:
    """What transformers and bitsandbytes wrote comes back as bitsandbytes itself dequantizes it."""

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("name", ["gpt-2", "phi-3", "mixtral", "t5", "bert", "qwen2-vl", "mamba", "deepseek-v3"])
    def test_it_comes_back_as_the_library_dequantizes_it(self, name, bits, tmp_path):
        architecture = ARCHITECTURES[name]
        saved(architecture, tmp_path / "dense")
        kind = getattr(transformers, architecture.model)
        config = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        packed = kind.from_pretrained(tmp_path / "dense", quantization_config=config, dtype=torch.float32)
        packed.save_pretrained(tmp_path / "source")
        output = upcast(tmp_path / "source", tmp_path)
        again = reloaded(output.folder, architecture.model)
        assert output.metrics["dequantized"] > 0
        expected = architecture.build()
        self.fill(expected, packed, turned=name == "gpt-2")
        check_same(expected, again, architecture.inputs)

    def fill(self, model, packed, *, turned):
        """Give `model` the weights of `packed`; `turned`: Conv1D keeps [I, O], the library [O, I]."""
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

        for name, parameter in packed.named_parameters():
            dense = parameter.data
            if hasattr(parameter, "quant_state"):
                dense = dequantize_4bit(dense, parameter.quant_state)
            elif dense.dtype == torch.int8:
                dense = int8_vectorwise_dequant(dense, parameter.SCB)
            turn = turned and type(parameter) is not torch.nn.Parameter
            model.get_parameter(name).data = dense.T if turn else dense


class TestTied:
    """A head tied to the embedding may be packed by itself."""

    def test_one_of_the_same_values_is_tied_again(self, tmp_path):
        architecture = ARCHITECTURES["llama, tied"]
        model = saved(architecture, tmp_path / "source")
        tensors = stored(tmp_path / "source")
        store(tmp_path / "source", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
        assert "lm_head" in pack(tmp_path / "source", model, dense="embed|norm")
        again = reloaded(upcast(tmp_path / "source", tmp_path).folder, architecture.model)
        check_same(model, again, architecture.inputs)
        assert again.lm_head.weight is again.model.embed_tokens.weight

    def test_one_of_other_values_is_left_apart(self, tmp_path):
        architecture = ARCHITECTURES["llama, tied"]
        model = saved(architecture, tmp_path / "source")
        tensors = stored(tmp_path / "source")
        head = -tensors["model.embed_tokens.weight"]
        store(tmp_path / "source", {**tensors, "lm_head.weight": head})
        pack(tmp_path / "source", model, dense="embed|norm")
        again = reloaded(upcast(tmp_path / "source", tmp_path).folder, architecture.model)
        assert torch.equal(again.lm_head.weight, head)
        assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


class TestConfig:
    """config.json says which class counts, and in which of its parts the quantization stands."""

    def test_a_quantization_of_the_language_model_alone_is_found_and_removed(self, tmp_path):
        architecture = ARCHITECTURES["llava"]
        model = saved(architecture, tmp_path / "source")
        modules = pack(tmp_path / "source", model, dense=architecture.dense)
        text = Checkpoint.open(tmp_path / "source").config["text_config"]
        text = {**text, "quantization_config": PACKERS["gptq"][1], "torch_dtype": "float16"}
        configure(tmp_path / "source", quantization_config=None, text_config=text)
        output = upcast(tmp_path / "source", tmp_path)
        assert output.metrics["dequantized"] == len(modules)
        after = Checkpoint.open(output.folder).config
        assert after["text_config"] == {
            key: "float32" if key == "torch_dtype" else value
            for key, value in text.items()
            if key != "quantization_config"
        }
        again = reloaded(output.folder, architecture.model)
        assert {tensor.dtype for tensor in again.parameters()} == {torch.float32}
        check_same(model, again, architecture.inputs)

    def test_a_head_that_the_named_class_lacks_is_refused(self, tmp_path):
        model = saved(ARCHITECTURES["a sequence classifier"], tmp_path / "source")
        pack(tmp_path / "source", model, dense=ARCHITECTURES["a sequence classifier"].dense)
        configure(tmp_path / "source", architectures=["LlamaForCausalLM"])
        with pytest.raises(UnexpectedTensor, match=r"score\.weight: llama has no place for it"):
            upcast(tmp_path / "source", tmp_path)

    def test_a_head_that_the_named_class_needs_is_missed(self, tmp_path):
        ARCHITECTURES["bert"].build().bert.save_pretrained(tmp_path / "source")
        configure(tmp_path / "source", architectures=["BertForMaskedLM"])
        with pytest.raises(MissingTensor, match=r"cls\.predictions\.bias: is in no shard"):
            upcast(tmp_path / "source", tmp_path)

    def test_one_that_transformers_does_not_know_is_a_sentence(self, tmp_path):
        saved(ARCHITECTURES["llama, tied"], tmp_path / "source")
        configure(tmp_path / "source", model_type="marvel", architectures=["MarvelForCausalLM"])
        with pytest.raises(CheckpointError, match="cannot build model_type 'marvel'") as caught:
            upcast(tmp_path / "source", tmp_path)
        assert "\n" not in str(caught.value)

    def test_one_that_contradicts_itself_is_a_sentence(self, tmp_path):
        saved(ARCHITECTURES["llama, tied"], tmp_path / "source")
        configure(tmp_path / "source", num_attention_heads=0)
        with pytest.raises(CheckpointError, match="cannot build model_type 'llama'"):
            upcast(tmp_path / "source", tmp_path)
