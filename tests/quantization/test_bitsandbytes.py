"""bitsandbytes folders are the parent's, with packed weights that are bitsandbytes' own."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bitsandbytes import functional
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from pipeline import progress
from pipeline.checkpoint import Checkpoint
from pipeline.errors import NonFinite, ReloadMismatch
from pipeline.quantization import bitsandbytes
from pipeline.quantization.folder import Order
from pipeline.targets import BitsAndBytesTarget
from tests.checkpoints import tiny_llama

Q_PROJ = "model.layers.0.self_attn.q_proj"
TARGETS = {
    "nf4": BitsAndBytesTarget(format="bitsandbytes"),
    "nf4-plain": BitsAndBytesTarget(format="bitsandbytes", double_quant=False),
    "fp4": BitsAndBytesTarget(format="bitsandbytes", type="fp4"),
    "int8": BitsAndBytesTarget(format="bitsandbytes", bits=8),
}


def order(folder, target, dense):
    return Order(dense=dense, out=folder / "out", scratch=folder / "scratch", target=target)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module", params=TARGETS)
def made(request, dense, tmp_path_factory):
    """One folder for each target: (target, order, what the writer said of it)."""
    target = TARGETS[request.param]
    one = order(tmp_path_factory.mktemp(request.param), target, dense)
    return target, one, bitsandbytes.write(one)


def test_transformers_reloads_it_with_no_key_missing_unexpected_or_mismatched(made):
    _, one, _ = made
    model, report = AutoModelForCausalLM.from_pretrained(one.out, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds[Q_PROJ] == ("Linear8bitLt" if made[0].bits == 8 else "Linear4bit")
    assert kinds["lm_head"] == "Linear"


def test_the_stored_codes_are_those_of_bitsandbytes_itself(made, dense):
    target, one, _ = made
    weight = load_file(dense / "model.safetensors")[f"{Q_PROJ}.weight"]
    stored = load_file(one.out / "model.safetensors")
    if target.bits == 8:
        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        assert torch.equal(stored[f"{Q_PROJ}.SCB"], scales)
    else:
        codes, state = functional.quantize_4bit(
            weight, quant_type=target.type or "nf4", compress_statistics=target.double_quant is not False
        )
        assert torch.equal(stored[f"{Q_PROJ}.weight.absmax"], state.absmax)
    assert torch.equal(stored[f"{Q_PROJ}.weight"], codes)


SMALL = {"vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
MODELS = {
    "llama-in-float32": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=72, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=1, n_head=4)).half(),
    "bert-classifier": lambda: BertForSequenceClassification(BertConfig(**SMALL, intermediate_size=72, num_labels=3)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SMALL, intermediate_size=96, num_key_value_heads=2, num_local_experts=2)
    ).bfloat16(),
}


@pytest.mark.parametrize("target", ["nf4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_every_packed_tensor_and_the_config_are_those_that_transformers_saves(tmp_path, name, target):
    """Transposed layers are turned, experts that lie in one tensor stay dense, and so does a classifier's head."""
    MODELS[name]().save_pretrained(tmp_path / "dense")
    one = order(tmp_path, TARGETS[target], tmp_path / "dense")
    written = bitsandbytes.write(one)
    config = Checkpoint.open(one.out).config["quantization_config"]
    model = type(MODELS[name]()).from_pretrained(
        tmp_path / "dense", quantization_config=dict(config), dtype="auto", device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "saved")
    found, saved = load_file(one.out / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    packed = {key for key in found if key.startswith(tuple(f"{module}." for module in written.packed))}
    packed = {key for key in packed if not key.endswith(".bias")}
    assert config == Checkpoint.open(tmp_path / "saved").config["quantization_config"]
    assert len(packed) >= 3 * len(written.packed) > 0
    for key in packed:
        assert (found[key].dtype, found[key].shape) == (saved[key].dtype, saved[key].shape), key
        assert torch.equal(found[key], saved[key]), key
    before = load_file(tmp_path / "dense" / "model.safetensors")
    assert found.keys() - packed == before.keys() - {f"{module}.weight" for module in written.packed}


def test_weights_are_quantized_in_the_dtype_that_transformers_loads_them_in(tmp_path):
    """The config's, where the file's is another: the dtype on disk of what stays dense does not change."""
    dense = tiny_llama(tmp_path / "dense", layers=1, dtype="float32")
    weight = load_file(dense / "model.safetensors")[f"{Q_PROJ}.weight"]
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    one = order(tmp_path, TARGETS["nf4-plain"], dense)
    bitsandbytes.write(one)
    found = load_file(one.out / "model.safetensors")
    codes, state = functional.quantize_4bit(weight.bfloat16(), quant_type="nf4")
    assert torch.equal(found[f"{Q_PROJ}.weight"], codes)
    assert torch.equal(found[f"{Q_PROJ}.weight.absmax"], state.absmax)
    assert found["model.norm.weight"].dtype == torch.float32


def test_an_architecture_that_joins_linear_layers_is_refused(tmp_path, monkeypatch):
    """Each stored part alone would be packed under a name that transformers does not look for."""
    dense = tiny_llama(tmp_path / "dense", layers=1)
    tensors = load_file(dense / "model.safetensors")
    tensors[f"{Q_PROJ}.weight"] = tensors[f"{Q_PROJ}.weight"][:64].clone()
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ReloadMismatch, match=f"{Q_PROJ}.weight: is only a part of"):
        bitsandbytes.write(order(tmp_path, TARGETS["nf4"], dense))
    assert not (tmp_path / "out").exists()


def test_nothing_of_bitsandbytes_is_imported_to_write_it(tmp_path, dense):
    """It stays the reader's library: writing loads neither it nor a model."""
    program = (
        "import sys; from pathlib import Path; from pipeline.quantization import bitsandbytes, folder;"
        "from pipeline.targets import parse_target; root = Path(sys.argv[1]);"
        "order = folder.Order(dense=Path(sys.argv[2]), out=root / 'out', scratch=root / 'scratch',"
        " target=parse_target('nf4'));"
        "bitsandbytes.write(order); assert 'bitsandbytes' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path), str(dense)], check=True, env=environment)


def test_every_tensor_is_a_step_of_progress(made, tmp_path):
    _, one, _ = made
    seen = []
    with progress.shown_by(seen.append):
        bitsandbytes.write(replace(one, out=tmp_path / "again", scratch=tmp_path / "scratch"))
    unit = f"{one.target.variant} tensors"
    assert [step.done for step in seen if step.unit == unit] == list(range(22))
    assert {step.total for step in seen} == {21}


def test_what_is_not_packed_is_the_parents_own(made, dense):
    """Config, tokenizer and dense tensors are taken over byte for byte; only quantization_config is new."""
    _, one, written = made
    parent, child = Checkpoint.open(dense), Checkpoint.open(one.out)
    assert child.companions == parent.companions
    assert all((one.out / name).read_bytes() == (dense / name).read_bytes() for name in parent.companions)
    config = dict(child.config)
    assert config.pop("quantization_config")["quant_method"] == "bitsandbytes"
    assert config == parent.config
    before, after = load_file(dense / "model.safetensors"), load_file(one.out / "model.safetensors")
    assert written.dense == ("lm_head", "model.embed_tokens")
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(before[name], after[name])


def test_the_same_order_gives_the_same_bytes(made, tmp_path):
    _, one, _ = made
    again = replace(one, out=tmp_path / "again", scratch=tmp_path / "scratch")
    bitsandbytes.write(again)
    for path in one.out.iterdir():
        assert path.read_bytes() == (again.out / path.name).read_bytes(), path.name


def test_bits_per_weight_count_the_bytes_on_disk(made):
    target, one, written = made
    with safe_open(one.out / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    nbytes = sum(t.nbytes for name, t in tensors.items() if "_proj" in name)
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)
    assert written.packed_bits_per_weight == pytest.approx(8 * nbytes / weights)
    assert target.bits < written.packed_bits_per_weight < written.bits_per_weight < 16


def test_a_tied_head_stays_tied(tmp_path):
    dense = tiny_llama(tmp_path / "dense", layers=1, tied=True)
    one = order(tmp_path, TARGETS["nf4"], dense)
    bitsandbytes.write(one)
    model, report = AutoModelForCausalLM.from_pretrained(one.out, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in Checkpoint.open(one.out).tensors


def test_a_classifier_keeps_its_head_dense(tmp_path):
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "dense")
    one = order(tmp_path, TARGETS["nf4"], tmp_path / "dense")
    assert bitsandbytes.write(one).dense == ("model.embed_tokens", "score")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [f"{Q_PROJ}.weight", "model.norm.weight"])
def test_a_weight_that_is_no_number_is_refused_by_name_and_nothing_is_left(tmp_path, name, target):
    dense = tiny_llama(tmp_path / "dense", layers=1)
    tensors = load_file(dense / "model.safetensors")
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFinite, match=f"{name}: holds NaN or infinity"):
        bitsandbytes.write(order(tmp_path, TARGETS[target], dense))
    assert not (tmp_path / "out").exists()


def test_a_folder_left_by_a_kill_is_replaced(tmp_path):
    dense = tiny_llama(tmp_path / "dense", layers=1)
    one = order(tmp_path, TARGETS["nf4"], dense)
    one.out.mkdir()
    (one.out / "model.safetensors").write_bytes(b"half")
    (one.out / "left.json").write_text(json.dumps({}))
    bitsandbytes.write(one)
    assert not (one.out / "left.json").exists()
    assert Checkpoint.open(one.out).quantization.bits == 4
