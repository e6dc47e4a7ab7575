"""A quantized folder takes packed weights from the library and everything else from the dense parent."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint import Checkpoint
from pipeline.digests import digest_packed
from pipeline.errors import NonFinite, ReloadMismatch
from pipeline.kept import Donor
from pipeline.manifest import read_content
from pipeline.quantization.folder import Order, write_folder
from pipeline.targets import GPTQTarget
from tests.checkpoints import tiny_llama

Q_PROJ = "model.layers.0.self_attn.q_proj"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def dense(tmp_path):
    return tiny_llama(tmp_path / "dense", layers=1)


def made_by_a_library(dense, folder, *, remove=(), **changes):
    """What a library that packs one module and keeps all else in float32 leaves behind."""
    tensors = {name: tensor.float() for name, tensor in load_file(dense / "model.safetensors").items()}
    del tensors[f"{Q_PROJ}.weight"]
    tensors |= {
        f"{Q_PROJ}.qweight": torch.arange(16 * 128, dtype=torch.int32).view(16, 128),
        f"{Q_PROJ}.qzeros": torch.zeros(1, 16, dtype=torch.int32),
        f"{Q_PROJ}.scales": torch.ones(1, 128, dtype=torch.float16),
        f"{Q_PROJ}.g_idx": torch.zeros(128, dtype=torch.int32),
    }
    tensors = {name: tensor for name, tensor in {**tensors, **changes}.items() if name not in remove}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"made_in": "/some/where", "quantization_config": {}}))
    (folder / "tokenizer.json").write_text("{}")
    return Checkpoint.open(folder)


def write(tmp_path, dense, made, *, scaled=False, kept=None):
    target = GPTQTarget(format="gptq")
    order = Order(dense=dense, out=tmp_path / "out", scratch=tmp_path / "scratch", target=target, kept=kept or {})
    written = write_folder(
        order, Checkpoint.open(dense), made, quantization={"bits": 4, "quant_method": "gptq"}, scaled=scaled
    )
    return written, load_file(tmp_path / "out" / "model.safetensors")


def test_dense_tensors_config_and_tokenizer_are_the_parents(tmp_path, dense):
    made = made_by_a_library(dense, tmp_path / "made", **{NORM: torch.full((128,), 7.0)})
    written, tensors = write(tmp_path, dense, made)
    before = load_file(dense / "model.safetensors")
    assert written.packed == (Q_PROJ,)
    assert {name for name in tensors if name not in before} == {
        f"{Q_PROJ}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")
    }
    assert all(torch.equal(tensors[name], before[name]) for name in before if name != f"{Q_PROJ}.weight")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "made_in" not in config
    assert config["quantization_config"] == {"bits": 4, "quant_method": "gptq"}
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


def test_dense_tensors_that_a_library_scaled_are_its_own_in_the_parents_dtype(tmp_path, dense):
    made = made_by_a_library(dense, tmp_path / "made", **{NORM: torch.full((128,), 7.0)})
    _, tensors = write(tmp_path, dense, made, scaled=True)
    assert torch.equal(tensors[NORM], torch.full((128,), 7.0, dtype=torch.bfloat16))


def test_a_bias_of_zeros_that_the_architecture_lacks_is_left_out(tmp_path, dense):
    made = made_by_a_library(dense, tmp_path / "made", **{f"{Q_PROJ}.bias": torch.zeros(128, dtype=torch.float16)})
    _, tensors = write(tmp_path, dense, made)
    assert f"{Q_PROJ}.bias" not in tensors


def test_any_other_tensor_that_the_parent_lacks_stops_the_write(tmp_path, dense):
    made = made_by_a_library(dense, tmp_path / "made", **{f"{Q_PROJ}.bias": torch.ones(128, dtype=torch.float16)})
    with pytest.raises(ReloadMismatch, match=f"{Q_PROJ}.bias.*no such tensor"):
        write(tmp_path, dense, made)
    assert not (tmp_path / "out").exists()


def test_a_scaled_tensor_of_another_shape_stops_the_write(tmp_path, dense):
    made = made_by_a_library(dense, tmp_path / "made", **{NORM: torch.ones(64)})
    with pytest.raises(ReloadMismatch, match=rf"{NORM}.*\[64\].*\[128\]"):
        write(tmp_path, dense, made, scaled=True)


def test_an_infinite_scale_is_refused_by_name(tmp_path, dense):
    scales = torch.full((1, 128), float("inf"), dtype=torch.float16)
    made = made_by_a_library(dense, tmp_path / "made", **{f"{Q_PROJ}.scales": scales})
    with pytest.raises(NonFinite, match=f"{Q_PROJ}.scales"):
        write(tmp_path, dense, made)


def kept_elsewhere(dense, folder):
    """A donor of Q_PROJ, whose packed tensors are others than the library's; what was noted of them is their digest."""
    made_by_a_library(dense, folder, **{f"{Q_PROJ}.qweight": torch.ones(16, 128, dtype=torch.int32)})
    digest = digest_packed(Q_PROJ, (".g_idx", ".qweight", ".qzeros", ".scales"), read_content(folder).tensors)
    return Donor(reference="bot/gptq@v0001", folder=folder, made_from={}, packed={Q_PROJ: digest})


def test_a_kept_module_is_its_donors_whatever_the_library_wrote(tmp_path, dense):
    donor = kept_elsewhere(dense, tmp_path / "donor")
    _, tensors = write(tmp_path, dense, made_by_a_library(dense, tmp_path / "made"), kept={Q_PROJ: donor})
    theirs, before = (load_file(folder / "model.safetensors") for folder in (donor.folder, dense))
    parts = [f"{Q_PROJ}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")]
    assert all(torch.equal(tensors[name], theirs[name]) for name in parts)
    assert all(torch.equal(tensors[name], before[name]) for name in before if name != f"{Q_PROJ}.weight")


def test_a_donor_whose_bytes_are_not_those_that_were_noted_is_refused_by_module(tmp_path, dense):
    donor = replace(kept_elsewhere(dense, tmp_path / "donor"), packed={Q_PROJ: "another"})
    made = made_by_a_library(dense, tmp_path / "made")
    with pytest.raises(ReloadMismatch, match=rf"{Q_PROJ}: its packed tensors in .*donor are not those that bot/gptq@v"):
        write(tmp_path, dense, made, kept={Q_PROJ: donor})
    assert not (tmp_path / "out").exists()


def test_bits_per_weight_are_bytes_over_weights(tmp_path, dense):
    written, tensors = write(tmp_path, dense, made_by_a_library(dense, tmp_path / "made"))
    # 4 bits of code; for each output 16 of scale and 4 of zero point; for each input 32 of g_idx
    assert written.packed_bits_per_weight == pytest.approx(4 + (16 + 4 + 32) / 128)
    weights = sum(tensor.numel() for tensor in load_file(dense / "model.safetensors").values())
    assert written.bits_per_weight == pytest.approx(8 * sum(tensor.nbytes for tensor in tensors.values()) / weights)
