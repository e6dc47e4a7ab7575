"""Upcast writes exactly what the architecture keeps, or nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline import progress
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, MissingTensor, NonFinite, UnexpectedTensor, UnsupportedFormat
from pipeline.jobs import Job
from pipeline.skeleton import skeleton_of
from pipeline.stages import upcast
from tests.checkpoints import tiny_llama, with_chat_template

GPTQ = {"quant_method": "gptq", "bits": 8, "group_size": -1, "checkpoint_format": "gptq_v2", "sym": False}
O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.fixture
def llama(tmp_path):
    return tiny_llama(tmp_path / "source", layers=1)


def run(source, workspace, *, dtype="bfloat16", trust_remote_code=False):
    job = Job(
        inputs={"source": source},
        options={"dtype": dtype},
        workspace=workspace,
        trust_remote_code=trust_remote_code,
    )
    (output,) = upcast.run(job)
    return output


def edit(folder, *, remove=(), config=None, **tensors):
    """Change tensors of the folder's only shard, and keys of its config."""
    path = folder / "model.safetensors"
    stored = load_file(path)
    changed = {name: tensor.clone() for name, tensor in stored.items() if name not in remove} | tensors
    save_file(changed, path, metadata={"format": "pt"})
    if config:
        kept = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(kept | config))
    return folder


def in_8_bits(weight, *, module):
    """A weight [O, I] as GPTQ of 8 bits, a group for each channel, scales powers of two: nothing is rounded twice."""
    outputs, inputs = weight.shape
    scale = torch.exp2(torch.ceil(torch.log2(weight.abs().amax(1).float() / 127)))
    codes = (weight.float() / scale[:, None]).round().to(torch.int64) + 128
    shifts = torch.arange(0, 32, 8)
    words = (codes.T.reshape(inputs // 4, 4, outputs) << shifts[:, None]).sum(1)
    return {
        f"{module}.qweight": (words - ((words >> 31) << 32)).to(torch.int32),
        f"{module}.qzeros": torch.full((1, outputs // 4), -2139062144, dtype=torch.int32),  # 0x80808080
        f"{module}.scales": scale.half()[None],
        f"{module}.g_idx": torch.zeros(inputs, dtype=torch.int32),
    }, (codes - 128) * scale[:, None]


def packed_llama(folder, **kwargs):
    """A tiny Llama whose o_proj is packed, and that weight."""
    source = tiny_llama(folder, layers=1, **kwargs)
    packed, weight = in_8_bits(load_file(source / "model.safetensors")[f"{O_PROJ}.weight"], module=O_PROJ)
    return edit(source, remove=[f"{O_PROJ}.weight"], config={"quantization_config": GPTQ}, **packed), weight


def test_a_dense_checkpoint_keeps_its_bytes(llama, tmp_path):
    output = run(llama, tmp_path)
    assert output.variant == "dense"
    assert output.folder == tmp_path / "out"
    assert output.notes == {"dropped": {}, "packed_source": "dense", "packed": {}}
    before, after = load_file(llama / "model.safetensors"), load_file(output.folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_packed_module_becomes_dense_and_the_rest_stays(tmp_path):
    source, weight = packed_llama(tmp_path / "source")
    output = run(source, tmp_path)
    assert output.notes["packed_source"] == "gptq"
    assert output.notes["packed"].keys() == {O_PROJ}
    assert output.metrics == {"tensors": 12, "dequantized": 1}
    written = load_file(output.folder / "model.safetensors")
    assert torch.equal(written[f"{O_PROJ}.weight"], weight.bfloat16())
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    model, report = AutoModelForCausalLM.from_pretrained(output.folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(model.get_parameter(f"{O_PROJ}.weight"), weight.bfloat16())


def test_the_config_loses_its_quantization_and_nothing_else(tmp_path):
    source, _ = packed_llama(tmp_path / "source")
    before = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({"zz": "é", **before, "aa": [1, {"b": None}]}))
    after = json.loads((run(source, tmp_path, dtype="float32").folder / "config.json").read_text())
    expected = {"zz": "é", **before, "aa": [1, {"b": None}]}
    del expected["quantization_config"]
    assert list(after.items()) == list((expected | {"dtype": "float32"}).items())


@pytest.mark.parametrize(("keys", "expected"), [({}, "dtype"), ({"torch_dtype": "float16"}, "torch_dtype")])
def test_the_dtype_is_set_under_the_name_the_config_uses(llama, tmp_path, keys, expected):
    config = json.loads((llama / "config.json").read_text())
    del config["dtype"]
    (llama / "config.json").write_text(json.dumps(config | keys))
    after = json.loads((run(llama, tmp_path).folder / "config.json").read_text())
    assert {key: value for key, value in after.items() if "dtype" in key} == {expected: "bfloat16"}


def test_what_goes_with_the_weights_is_copied_byte_for_byte(llama, tmp_path):
    with_chat_template(llama)
    (llama / "quantize_config.json").write_text("{}")
    (llama / "chat_templates").mkdir()
    (llama / "chat_templates" / "tool.jinja").write_bytes(b"{{ 1 }}\r\n")
    output = run(llama, tmp_path)
    companions = Checkpoint.open(llama).companions
    assert "chat_templates/tool.jinja" in companions
    assert Checkpoint.open(output.folder).companions == companions
    assert all((output.folder / name).read_bytes() == (llama / name).read_bytes() for name in companions)
    assert not (output.folder / "quantize_config.json").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_weight_is_cast_to_the_dtype_asked_for(tmp_path, dtype):
    source = tiny_llama(tmp_path / "source", layers=1, dtype="float32")
    written = load_file(run(source, tmp_path, dtype=dtype).folder / "model.safetensors")
    before = load_file(source / "model.safetensors")
    assert all(torch.equal(written[name], before[name].to(getattr(torch, dtype))) for name in before)


def test_progress_counts_tensors(llama, tmp_path):
    events = []
    with progress.shown_by(events.append):
        run(llama, tmp_path)
    assert [event.done for event in events] == list(range(1, 13))
    assert {(event.stage, event.total, event.unit) for event in events} == {("upcast", 12, "tensors")}


def test_a_rerun_starts_from_a_clean_folder(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("half a shard")
    (tmp_path / "out" / "stale.json").write_text("{}")
    folder = run(llama, tmp_path).folder
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "stale.json" not in first
    assert {path.name: path.read_bytes() for path in run(llama, tmp_path).folder.iterdir()} == first


@pytest.mark.parametrize(
    ("remove", "add", "error", "said"),
    [
        (["model.norm.weight"], {}, MissingTensor, r"model\.norm\.weight: is in no shard"),
        (["lm_head.weight"], {}, MissingTensor, r"lm_head\.weight: is in no shard"),
        ([], {"extra": torch.zeros(1)}, UnexpectedTensor, "extra: llama has no place for it"),
        ([], {f"{O_PROJ}.bias": torch.ones(128)}, UnexpectedTensor, "o_proj.bias: llama has no place"),
        (
            [],
            {"model.norm.weight": torch.zeros(64)},
            CheckpointError,
            r"shape \[64\], but config.json describes \[128\]",
        ),
        ([], {f"{O_PROJ}.weight": torch.zeros(128, 128, dtype=torch.int8)}, CheckpointError, "is I8 and not packed"),
        (
            [],
            {f"{O_PROJ}.weight": torch.zeros(128, 128).to(torch.float8_e4m3fn)},
            CheckpointError,
            "is F8_E4M3 and not",
        ),
        ([], {"model.norm.weight": torch.ones(128, dtype=torch.complex64)}, CheckpointError, "is torch.complex64 and"),
        ([], {f"{O_PROJ}.scales": torch.zeros(1, 128)}, UnexpectedTensor, r"o_proj\.scales: llama has no place"),
    ],
)
def test_what_the_architecture_does_not_keep_stops_it_before_anything_is_written(
    llama, tmp_path, remove, add, error, said
):
    with pytest.raises(error, match=said):
        run(edit(llama, remove=remove, **add), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "remove", "error", "said"),
    [
        ({"bits": 4}, [], CheckpointError, "o_proj: qweight has 32 rows, expected 16"),
        ({"group_size": 48}, [], CheckpointError, r"o_proj: qzeros has shape \[1, 32\], expected \[3, 32\]"),
        ({"bits": 5}, [], UnsupportedFormat, "gptq with bits 5"),
        ({"quant_method": "aqlm"}, [], UnsupportedFormat, "quant_method aqlm cannot be read"),
        ({}, [f"{O_PROJ}.qzeros"], MissingTensor, "o_proj: qzeros is in no shard"),
        ({}, [f"{O_PROJ}.qweight"], UnexpectedTensor, r"o_proj\.(scales|g_idx|qzeros): llama has no place"),
    ],
)
def test_a_malformed_module_stops_it_before_anything_is_written(tmp_path, config, remove, error, said):
    source, _ = packed_llama(tmp_path / "source")
    with pytest.raises(error, match=said):
        run(edit(source, remove=remove, config={"quantization_config": GPTQ | config}), tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_module_stored_twice_is_refused(tmp_path):
    source, weight = packed_llama(tmp_path / "source")
    with pytest.raises(UnexpectedTensor, match=r"o_proj\.weight: is stored both dense and as GPTQ"):
        run(edit(source, **{f"{O_PROJ}.weight": weight}), tmp_path)


def test_a_bias_of_zeros_and_what_the_architecture_ignores_are_dropped_and_recorded(llama, tmp_path):
    rotary = "model.layers.0.self_attn.rotary_emb.inv_freq"
    output = run(edit(llama, **{f"{O_PROJ}.bias": torch.zeros(128), rotary: torch.ones(16)}), tmp_path)
    assert output.notes["dropped"] == {
        f"{O_PROJ}.bias": "a bias of zeros that the architecture does not have",
        rotary: "the architecture ignores it",
    }
    assert len(Checkpoint.open(output.folder).tensors) == 12


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", f"{O_PROJ}.scales"])
def test_a_weight_that_is_not_finite_stops_it(tmp_path, name, value):
    source, _ = packed_llama(tmp_path / "source")
    tensor = load_file(source / "model.safetensors")[name].clone()
    tensor.flatten()[3] = value
    with pytest.raises(NonFinite, match="NaN or infinity"):
        run(edit(source, **{name: tensor}), tmp_path)


def test_a_weight_too_large_for_float16_stops_it(llama, tmp_path):
    source = edit(llama, **{"model.norm.weight": torch.full((128,), 1e5)})
    with pytest.raises(NonFinite, match=r"model\.norm\.weight: holds values too large for F16; choose"):
        run(source, tmp_path, dtype="float16")


class TestTied:
    """A tied lm_head may be absent, and is kept as it is where it is stored."""

    def test_it_may_be_absent(self, tmp_path):
        output = run(tiny_llama(tmp_path / "source", layers=1, tied=True), tmp_path)
        assert "lm_head.weight" not in Checkpoint.open(output.folder).tensors

    def test_the_embedding_may_be_absent_instead(self, tmp_path):
        source = tiny_llama(tmp_path / "source", layers=1, tied=True)
        weight = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
        output = run(edit(source, remove=["model.embed_tokens.weight"], **{"lm_head.weight": weight}), tmp_path)
        model = AutoModelForCausalLM.from_pretrained(output.folder)
        assert torch.equal(model.get_input_embeddings().weight, weight)

    def test_both_may_not(self, tmp_path):
        source = tiny_llama(tmp_path / "source", layers=1, tied=True)
        with pytest.raises(MissingTensor, match=r"embed_tokens\.weight|lm_head\.weight"):
            run(edit(source, remove=["model.embed_tokens.weight"]), tmp_path)

    def test_another_head_is_kept_and_transformers_leaves_it_untied(self, tmp_path):
        source = tiny_llama(tmp_path / "source", layers=1, tied=True)
        head = torch.randn(256, 128).bfloat16()
        output = run(edit(source, **{"lm_head.weight": head}), tmp_path)
        model = AutoModelForCausalLM.from_pretrained(output.folder)
        assert torch.equal(model.lm_head.weight, head)
        assert not torch.equal(model.get_input_embeddings().weight, head)


class TestRemoteCode:
    """Python files of a checkpoint travel, and run only where the job trusts them."""

    @pytest.fixture
    def own_code(self, llama):
        (llama / "own.py").write_text(
            "import pathlib, transformers\n"
            "pathlib.Path(__file__).with_name('ran').touch()\n"
            "class OwnConfig(transformers.LlamaConfig):\n    model_type = 'own'\n"
            "class OwnModel(transformers.LlamaForCausalLM):\n    config_class = OwnConfig\n"
        )
        auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        return edit(llama, config={"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto_map})

    def test_it_does_not_run_unless_trusted(self, own_code, tmp_path, monkeypatch):
        modules = tmp_path / "modules"
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
        with pytest.raises(CheckpointError, match="or trust_remote_code"):
            run(own_code, tmp_path)
        assert not modules.exists()

    def test_trusted_it_describes_the_weights_and_goes_along(self, own_code, tmp_path, monkeypatch):
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.syspath_prepend(tmp_path / "modules")
        output = run(own_code, tmp_path, trust_remote_code=True)
        assert (output.folder / "own.py").read_bytes() == (own_code / "own.py").read_bytes()
        assert len(Checkpoint.open(output.folder).tensors) == 12


def test_a_config_that_describes_far_more_than_is_stored_is_refused_at_once(llama, tmp_path):
    edit(llama, config={"num_hidden_layers": 90_000})
    with pytest.raises(CheckpointError, match="more than 10048 parameter tensors, far more than the checkpoint holds"):
        run(llama, tmp_path)


def test_the_skeleton_holds_no_memory(llama):
    """A model of 70 thousand million parameters is described as quickly as a tiny one."""
    edit(llama, config={"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "head_dim": 128,
                        "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256})  # fmt: skip
    skeleton = skeleton_of(llama, dtype=torch.bfloat16, trust_remote_code=False, stored=12)
    assert sum(tensor.numel() for tensor in skeleton.parameters.values()) > 70e9
