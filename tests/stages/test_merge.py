"""Merging: PEFT's arithmetic in float32, and not one byte changed elsewhere."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline import progress
from pipeline.checkpoint import Checkpoint
from pipeline.digests import digest_shard
from pipeline.errors import CheckpointError, NonFinite
from pipeline.jobs import Job
from pipeline.stages import merge
from tests.checkpoints import tiny_llama
from tests.training.runs import trained


@pytest.fixture(scope="module", params=["bfloat16"])
def base(request, tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "model", hidden=64, intermediate=96, dtype=request.param)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """A LoRA on every linear layer that changes what the model says."""
    return trained(base, tmp_path_factory.mktemp("train"), max_steps=6, learning_rate=2e-2).folder


def merged(base, adapter, workspace):
    job = Job(inputs={"base": base, "adapter": adapter}, options={}, workspace=workspace)
    [output] = merge.run(job)
    return output


def by_peft(base, adapter):
    """What PEFT's own merge of the whole model in float32 comes to."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    return model.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("lora", "changed"),
    [
        ({"r": 4, "target_modules": "all-linear"}, 14),
        ({"r": 4, "target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_alpha": 3}, 4),
        ({"r": 2, "target_modules": ["v_proj"], "use_dora": True}, 2),
        ({"r": 2, "target_modules": ["o_proj", "embed_tokens"]}, 3),
        ({"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head"]}, 3),
    ],
    ids=["linear", "rslora", "dora", "embedding", "saved"],
)
def test_merged_tensors_are_pefts_and_the_others_the_bases(base, tmp_path, lora, changed):
    adapter = trained(base, tmp_path / "train", lora=lora, max_steps=3, learning_rate=2e-2).folder
    output = merged(base, adapter, tmp_path / "merge")
    assert output.variant == "tuned"
    assert output.metrics["merged_tensors"] == changed
    before, after = Checkpoint.open(base), Checkpoint.open(output.folder)
    assert list(after.tensors.items()) == list(before.tensors.items())
    for name in ("config.json", *before.companions):
        assert (output.folder / name).read_bytes() == (base / name).read_bytes()
    _, old = digest_shard(base / "model.safetensors")
    _, new = digest_shard(output.folder / "model.safetensors")
    assert len([name for name in old if old[name] != new[name]]) == changed
    expected, found = by_peft(base, adapter), load_file(output.folder / "model.safetensors")
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@pytest.mark.parametrize("base", ["bfloat16", "float32"], indirect=True)
def test_the_merged_model_says_what_the_adapted_one_says(base, adapter, tmp_path):
    output = merged(base, adapter, tmp_path / "merge")
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tuned = AutoModelForCausalLM.from_pretrained(output.folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 67).reshape(2, 32)
    with torch.inference_mode():
        plain = dense(ids).logits
        adapted = PeftModel.from_pretrained(dense, adapter).eval()(ids).logits
        told = tuned(ids).logits
    apart = (adapted - plain).abs().max()
    rounding = 1e-5 if Checkpoint.open(base).config["dtype"] == "float32" else 0.02
    assert (told - adapted).abs().max() < rounding * apart.clamp(min=1)
    assert apart > 0.5  # the adapter says something


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    deep = tiny_llama(tmp_path / "deep", hidden=64, intermediate=96, layers=3)
    wide = tiny_llama(tmp_path / "wide", hidden=128, intermediate=96)
    for i, other in enumerate((deep, wide)):
        adapter = trained(other, tmp_path / f"train{i}", max_steps=1).folder
        with pytest.raises(CheckpointError, match=r"does not fit .* it has another base") as caught:
            merged(base, adapter, tmp_path / f"merge{i}")
        assert "\n" not in str(caught.value)


def test_a_damaged_adapter_is_refused(base, adapter, tmp_path):
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    broken = shutil.copytree(adapter, tmp_path / "nan")
    save_file(weights | {name: torch.full_like(weights[name], torch.nan)}, broken / "adapter_model.safetensors")
    with pytest.raises(NonFinite, match="holds NaN or infinity"):
        merged(base, broken, tmp_path / "merge1")
    partial = shutil.copytree(adapter, tmp_path / "partial")
    save_file({key: value for key, value in weights.items() if key != name}, partial / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit"):
        merged(base, partial, tmp_path / "merge2")


def test_shards_are_read_across_files_and_progress_counts_tensors(base, adapter, tmp_path):
    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded)
    (sharded / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="100KB")
    assert len(Checkpoint.open(sharded).shards) > 1
    events = []
    with progress.shown_by(events.append):
        output = merged(sharded, adapter, tmp_path / "merge")
    steps = [(event.stage, event.done, event.total, event.unit) for event in events]
    assert steps == [("merge", done, 21, "tensors") for done in range(1, 22)]
    whole = merged(base, adapter, tmp_path / "merge2")
    assert json.loads((output.folder / "config.json").read_text()) == json.loads((sharded / "config.json").read_text())
    found, expected = (load_file(each.folder / "model.safetensors") for each in (output, whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_projector_of_the_base_does_not_go_along_with_weights_that_changed(base, adapter, tmp_path):
    projected = shutil.copytree(base, tmp_path / "projected")
    (projected / "projector.json").write_text("{}")
    (projected / "projector.safetensors").write_bytes(b"")
    output = merged(projected, adapter, tmp_path / "merge")
    assert not list(output.folder.glob("projector.*"))
    assert (output.folder / "tokenizer.json").exists()
