"""Checkpoints name their tensors as their time did: each finds its place, is left out for a reason, or is refused."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pipeline.errors import UnexpectedTensor
from tests.architectures import ARCHITECTURES
from tests.packed_models import PACKERS, check_same, configure, pack, reloaded, saved, store, stored, upcast


def packed(name, folder, **extra):
    """The model of an architecture, and its packed checkpoint in `folder` with the tensors `extra`."""
    model = saved(ARCHITECTURES[name], folder)
    pack(folder, model, dense=ARCHITECTURES[name].dense)
    store(folder, {**stored(folder), **extra})
    return model


def check(model, name, tmp_path, dropped=()):
    """The packed checkpoint becomes `model`, without the tensors `dropped`."""
    output = upcast(tmp_path / "source", tmp_path)
    assert output.metrics["dequantized"] > 0
    assert set(output.notes["dropped"]) == set(dropped)
    check_same(model, reloaded(output.folder, ARCHITECTURES[name].model), ARCHITECTURES[name].inputs)
    return output


class TestPrefix:
    """A base model's tensors may lack the prefix that they have in a model with a head, and the reverse."""

    @pytest.mark.parametrize(("name", "base"), [("gpt-2", "transformer"), ("bloom", "transformer")])
    def test_a_base_model_under_the_name_of_one_with_a_head(self, name, base, tmp_path):
        model = ARCHITECTURES[name].build()
        getattr(model, base).save_pretrained(tmp_path / "source")
        configure(tmp_path / "source", architectures=[ARCHITECTURES[name].model])
        assert not any(key.startswith(base) for key in stored(tmp_path / "source"))
        pack(tmp_path / "source", model, dense=ARCHITECTURES[name].dense)
        check(model, name, tmp_path)

    def test_a_model_with_a_tied_head_under_the_name_of_its_base(self, tmp_path):
        model = packed("gpt-2", tmp_path / "source")
        configure(tmp_path / "source", architectures=["GPT2Model"])
        again = reloaded(upcast(tmp_path / "source", tmp_path).folder, "GPT2Model")
        check_same(model.transformer, again, ARCHITECTURES["gpt-2"].inputs)

    @pytest.mark.parametrize(
        ("architecture", "said"), [("BertModel", r"cls\.predictions\.\S+: bert has no place for it")]
    )
    def test_a_head_that_the_base_has_no_place_for_is_refused(self, architecture, said, tmp_path):
        packed("bert", tmp_path / "source")
        configure(tmp_path / "source", architectures=[architecture])
        with pytest.raises(UnexpectedTensor, match=said):
            upcast(tmp_path / "source", tmp_path)


class TestOldNames:
    """Names of older versions, and of the model's own state, beside those that transformers saves by."""

    def test_layer_norms_of_tensorflow(self, tmp_path):
        model = packed("bert", tmp_path / "source")
        old = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in stored(tmp_path / "source").items()
        }
        store(tmp_path / "source", old)
        assert sum(name.endswith(".gamma") for name in old) == 6
        check(model, "bert", tmp_path)

    @pytest.mark.parametrize("name", ["llava", "qwen2-vl", "gemma-3 with vision"])
    def test_a_vision_language_model_by_its_present_names(self, name, tmp_path):
        model = saved(ARCHITECTURES[name], tmp_path / "source")
        store(tmp_path / "source", model.state_dict())
        pack(tmp_path / "source", model, dense=ARCHITECTURES[name].dense)
        check(model, name, tmp_path)

    @pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "deepseek-v3"])
    def test_experts_that_are_one_tensor_already(self, name, tmp_path):
        model = saved(ARCHITECTURES[name], tmp_path / "source")
        store(tmp_path / "source", model.state_dict())
        pack(tmp_path / "source", model, dense=ARCHITECTURES[name].dense)
        output = check(model, name, tmp_path)
        assert "model.layers.1.mlp.experts.gate_up_proj" in load_file(output.folder / "model.safetensors")


class TestOldBuffers:
    """What older versions stored and newer ones compute is left out, with a reason."""

    MASK = torch.ones(32, 32).tril()[None, None]

    @pytest.mark.parametrize(
        ("name", "extra"),
        [
            ("llama, tied", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
            ("bert", {"bert.embeddings.position_ids": torch.arange(32)[None]}),
            ("gpt-2", {"transformer.h.0.attn.bias": MASK, "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)}),
            ("gpt-2", {"transformer.h.0.attn.bias": MASK.bool()}),
            ("gpt-j", {"transformer.h.0.attn.bias": MASK.byte(),
                       "transformer.h.0.attn.masked_bias": torch.tensor(-1e9)}),
            ("gpt-neox", {"gpt_neox.layers.0.attention.bias": MASK.bool(),
                          "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
                          "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}),
        ],
    )  # fmt: skip
    def test_a_buffer(self, name, extra, tmp_path):
        model = packed(name, tmp_path / "source", **extra)
        check(model, name, tmp_path, dropped=extra)

    @pytest.mark.parametrize(
        ("extra", "value"),
        [
            ("attn.bias", torch.ones(1, 1, 32, 32)),
            ("attn.bias", torch.ones(1, 1, 4, 32)),
            ("attn.masked_bias", torch.tensor(1.0)),
            ("attn.masked_bias", torch.full((32,), -1e9)),
        ],
    )
    def test_what_is_no_causal_mask_but_has_its_name_is_refused(self, extra, value, tmp_path):
        packed("gpt-j", tmp_path / "source", **{f"transformer.h.0.{extra}": value})
        with pytest.raises(UnexpectedTensor, match=rf"transformer\.h\.0\.{extra}: gptj has no place"):
            upcast(tmp_path / "source", tmp_path)


class TestIgnored:
    """Modules that a format's own list keeps dense, and packed ones that the architecture has no use for."""

    @pytest.mark.parametrize(
        ("layout", "key", "value"),
        [
            ("gptq", "dynamic", {r"-:.*(o_proj|mlp)": {}}),
            ("fp8", "modules_to_not_convert", ["o_proj", "mlp", "lm_head"]),
            ("compressed-tensors", "ignore", ["lm_head", r"re:.*o_proj", r"re:.*mlp.*"]),
        ],
    )
    def test_they_stay_as_they_are(self, layout, key, value, tmp_path):
        architecture = ARCHITECTURES["llama, tied"]
        model = saved(architecture, tmp_path / "source")
        modules = pack(tmp_path / "source", model, dense="embed|norm|o_proj|mlp", layout=layout)
        configure(tmp_path / "source", quantization_config={**PACKERS[layout][1], key: value})
        output = check(model, "llama, tied", tmp_path)
        assert output.metrics["dequantized"] == len(modules) == 6

    def test_those_that_bitsandbytes_was_told_to_skip(self, tmp_path):
        architecture = ARCHITECTURES["a sequence classifier"]
        saved(architecture, tmp_path / "dense")
        skipped = ["o_proj", "gate_proj", "up_proj", "down_proj", "score"]
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
        kind = getattr(transformers, architecture.model)
        kind.from_pretrained(tmp_path / "dense", quantization_config=config).save_pretrained(tmp_path / "source")
        output = upcast(tmp_path / "source", tmp_path)
        before, after = stored(tmp_path / "dense"), stored(output.folder)
        assert output.metrics["dequantized"] == 6
        changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
        assert len(changed) == 6
        assert all(name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")) for name in changed)

    def test_a_packed_layer_that_predicts_further_is_left_out_where_the_architecture_ignores_it(self, tmp_path):
        """DeepSeek-V3's layer 61, packed like any other; transformers has no place for it."""
        linear = "model.layers.61.mlp.experts.0.gate_proj"
        extra = {f"{linear}.{part}": tensor for part, tensor in PACKERS["gptq"][0](torch.zeros(16, 32)).items()}
        extra["model.layers.61.eh_proj.weight"] = torch.zeros(32, 64)
        model = packed("deepseek-v3", tmp_path / "source", **extra)
        check(model, "deepseek-v3", tmp_path, dropped=[f"{linear}.weight", "model.layers.61.eh_proj.weight"])

    def test_another_layer_too_many_is_refused(self, tmp_path):
        packed("deepseek-v3", tmp_path / "source", **{"model.layers.7.eh_proj.weight": torch.zeros(32, 64)})
        with pytest.raises(UnexpectedTensor, match=r"model\.layers\.7\.eh_proj\.weight: deepseek_v3 has no place"):
            upcast(tmp_path / "source", tmp_path)
