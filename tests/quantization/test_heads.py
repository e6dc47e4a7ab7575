"""A classifier's head stays dense in every format, and a projector goes along with its backbone, sealed anew."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pipeline import child, pairing
from pipeline.catalog import FORMATS
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError
from pipeline.jobs import Job
from pipeline.quantization import bitsandbytes, writers
from pipeline.quantization.folder import Order
from pipeline.quantization.reloaded import Reloaded
from pipeline.stages import upcast
from pipeline.targets import parse_target
from pipeline.training import load_projected
from tests.architectures import ARCHITECTURES
from tests.classifiers import LABELS, tiny_head, tiny_projected
from tests.quantization import reloading

# Architecture → its head, and the modules that a quantized config must name for it to stay dense.
HEADS = {
    "LlamaForSequenceClassification": (["score"], None),
    "LlamaForTokenClassification": (["score"], ["score"]),
    "BertForSequenceClassification": (["classifier"], ["classifier"]),
    "BertForTokenClassification": (["classifier"], ["classifier"]),
    "RobertaForSequenceClassification": (["classifier.dense", "classifier.out_proj"],) * 2,
}


def order(folder, dense, target, **more):
    return Order(dense=dense, out=folder / "out", scratch=folder / "scratch", target=parse_target(target), **more)


def distance(first, second):
    """The difference of logits, in the spread of the second."""
    found, right = torch.tensor(first["logits"]), torch.tensor(second["logits"])
    return float((found - right).std() / right.std())


@pytest.mark.parametrize("target", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", HEADS)
def test_bitsandbytes_leaves_the_head_as_it_was(tmp_path, architecture, target):
    dense = tiny_head(tmp_path / "dense", architecture, dtype="bfloat16")
    head, named = HEADS[architecture]
    one = order(tmp_path, dense, target)
    written = bitsandbytes.write(one)
    assert set(head) <= set(written.dense)
    before, after = load_file(dense / "model.safetensors"), load_file(one.out / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith(tuple(head)))
    assert json.loads((one.out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"] == named
    found, right = (reloading.logits(path, "bfloat16", 8) for path in (one.out, dense))
    assert not any(found["report"].values()), found["report"]
    assert all(found["modules"][name] == "Linear" for name in head)
    assert sum(kind.startswith("Linear") and kind != "Linear" for kind in found["modules"].values()) >= 12
    assert distance(found, right) < (0.1 if target == "int8" else 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "architecture"),
    [("gptq:group_size=32", "LlamaForSequenceClassification"), ("awq:group_size=32", "LlamaForTokenClassification")],
)
def test_gptqmodel_leaves_the_head_as_it_was(tmp_path, target, architecture):
    dense = tiny_head(tmp_path / "dense", architecture, dtype="float16")
    rows = torch.randint(3, 255, (16, 64), generator=torch.Generator().manual_seed(0)).tolist()
    one = order(tmp_path, dense, target, calibration=tuple(map(tuple, rows)))
    (((_, written),),) = writers.write([one])
    assert written.dense == ("model.embed_tokens", "score")
    before, after = load_file(dense / "model.safetensors"), load_file(one.out / "model.safetensors")
    assert torch.equal(after["score.weight"], before["score.weight"])
    found, right = (child.run("tests.quantization.reloading:logits", path, "float32", 8) for path in (one.out, dense))
    assert not any(found["report"].values()), found["report"]
    assert found["modules"]["score"] == "Linear"
    assert found["modules"]["model.layers.1.mlp.down_proj"] != "Linear"
    assert distance(found, right) < 0.5


@pytest.mark.parametrize("target", ["nf4", "int8"])
def test_a_projector_goes_along_with_its_backbone_and_is_sealed_to_it(tmp_path, target):
    dense = tiny_projected(tmp_path / "dense", "classification", classes=LABELS, dtype="bfloat16")
    one = order(tmp_path, dense, target)
    bitsandbytes.write(one)
    assert (one.out / pairing.WEIGHTS).read_bytes() == (dense / pairing.WEIGHTS).read_bytes()
    assert (one.out / pairing.DESCRIPTION).read_bytes() != (dense / pairing.DESCRIPTION).read_bytes()
    pairing.check(one.out)
    tokens = torch.stack([torch.arange(3 + i, 35 + i) for i in range(8)])
    with torch.no_grad():
        found, right = (load_projected(path)(tokens, torch.ones_like(tokens)).logits for path in (one.out, dense))
    assert 0 < float((found - right).std() / right.std()) < 0.5


def test_an_upcast_takes_the_projector_along_too(tmp_path):
    dense = tiny_projected(tmp_path / "dense", "classification", classes=LABELS, dtype="bfloat16")
    one = order(tmp_path, dense, "nf4")
    bitsandbytes.write(one)
    job = Job(inputs={"source": one.out}, options={"dtype": "bfloat16"}, workspace=tmp_path / "work")
    (output,) = upcast.run(job)
    pairing.check(output.folder)
    assert Checkpoint.open(output.folder).quantization is None
    assert (output.folder / pairing.WEIGHTS).read_bytes() == (dense / pairing.WEIGHTS).read_bytes()


@pytest.mark.parametrize("stage", ["quantize", "upcast"])
def test_a_projector_of_another_backbone_is_not_sealed_to_this_one(tmp_path, stage):
    """Else what load_projected refuses would pass as soon as it is quantized."""
    dense = tiny_projected(tmp_path / "dense", "classification", classes=LABELS, dtype="bfloat16")
    other = tiny_head(tmp_path / "other", "LlamaForSequenceClassification", dtype="bfloat16")
    shutil.copyfile(other / "model.safetensors", dense / "model.safetensors")
    with pytest.raises(CheckpointError, match="changed since projector and backbone were sealed"):
        if stage == "quantize":
            bitsandbytes.write(order(tmp_path, dense, "nf4"))
        else:
            next(upcast.run(Job(inputs={"source": dense}, options={"dtype": "bfloat16"}, workspace=tmp_path / "work")))


def test_the_projector_counts_as_part_of_the_checkpoint(tmp_path):
    """What is digested, copied and fetched from the hub."""
    dense = tiny_projected(tmp_path, "pairs")
    assert {pairing.WEIGHTS, pairing.DESCRIPTION} <= set(Checkpoint.open(dense).files)
    assert pairing.WEIGHTS not in Checkpoint.open(dense).shards
    assert not FORMATS["gptq"].packed_modules(Checkpoint.open(dense).tensors)


@pytest.mark.slow
def test_awq_names_every_linear_layer_that_it_leaves_dense(tmp_path):
    """Calibrated on text, a model that sees pictures keeps its vision tower dense, in which transformers would look."""
    ARCHITECTURES["llava"].build().save_pretrained(tmp_path / "dense")
    rows = tuple(tuple((torch.arange(16) * 7 + i).remainder(60).tolist()) for i in range(6))
    one = order(tmp_path, tmp_path / "dense", "awq:group_size=32", calibration=rows)
    ((made,),) = writers.write([one])
    named = json.loads((one.out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert {"lm_head", "model.vision_tower.encoder.layers.0.mlp.fc1"} <= set(named)
    (found,) = writers.reload([made])
    assert isinstance(found, Reloaded), found
    assert found.modules == 14
