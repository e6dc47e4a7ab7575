"""The same work on a CUDA device: it is used where there is one, and the figures stay those of the CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from pipeline import formats, outcome
from pipeline.catalog import FORMATS
from pipeline.checkpoint import Checkpoint
from pipeline.execute import run_step
from pipeline.plan import make_plan
from pipeline.recipe import parse_recipe
from pipeline.shards import ShardReader
from tests.checkpoints import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

RECIPE = """
name: bot
source: {root}/model
train:
  method: {method}
  data: {root}/rows.jsonl
  sequence_length: 64
  arguments: {{max_steps: 4, per_device_train_batch_size: 2, learning_rate: 1e-3}}
quantize: [{{format: bitsandbytes}}, {{format: gptq, group_size: 32}}, {{format: awq, group_size: 32}}]
calibration: {{samples: 8, sequence_length: 64}}
evaluate: {{data: {root}/rows.jsonl, sequence_length: 64}}
store: {root}/{method}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    tiny_llama(folder / "model")
    rows = [json.dumps({"text": f"Row {i} says that {i} and {i} are {2 * i}. " * 8}) for i in range(32)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_whole_job_runs_on_the_device(root, method):
    plan = make_plan(parse_recipe(RECIPE.format(root=root, method=method), where="r"))
    for step in plan.steps:
        run_step(plan, step)
    rows = {row.variant: row for row in outcome.rows(plan)}
    assert rows.keys() == {"dense", "tuned", "nf4", "gptq-4bit", "awq-4bit"}
    for variant in ("nf4", "gptq-4bit", "awq-4bit"):
        scores = rows[variant].scores
        assert scores is not None
        assert scores.kl_divergence is not None
        assert scores.kl_divergence < 0.5, variant


def test_dequantizing_on_the_device_gives_the_weights_of_the_cpu(root):
    plan = make_plan(parse_recipe(RECIPE.format(root=root, method="lora"), where="r"))
    for step in plan.steps:
        run_step(plan, step)
    for variant, row in (("nf4", "bnb-4bit"), ("gptq-4bit", "gptq"), ("awq-4bit", "awq")):
        checkpoint = Checkpoint.open(outcome.made(plan)[variant].path)
        assert checkpoint.quantization is not None
        with ShardReader(checkpoint) as reader:
            group = next(group for group in reader.groups(FORMATS[row]) if group.packed)
            moved = {part: tensor.cuda() for part, tensor in group.tensors.items()}
            there = replace(group, tensors=moved)
            read = formats.load(FORMATS[row]).dequantize
            here, on_device = read(group, checkpoint.quantization), read(there, checkpoint.quantization)
        assert on_device.is_cuda
        torch.testing.assert_close(on_device.cpu(), here, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["nf4", "int8", "gptq", "gptq desc_act", "awq", "fp8", "compressed-tensors int4"])
def test_an_upcast_on_the_device_writes_the_bytes_of_the_cpu(name, tmp_path, monkeypatch):
    from benchmarks import synthetic
    from pipeline.jobs import Job
    from pipeline.stages import upcast
    from pipeline.upcasting import stream

    synthetic.write(tmp_path / "source", name, synthetic.TINY)
    written = []
    for device in (stream.CPU, torch.device("cuda", 0)):
        monkeypatch.setattr(stream, "fastest", lambda *_, device=device: device)
        workspace = tmp_path / device.type
        workspace.mkdir()
        (output,) = upcast.run(
            Job(inputs={"source": tmp_path / "source"}, options={"dtype": "bfloat16"}, workspace=workspace)
        )
        written.append((output.folder / "model.safetensors").read_bytes())
    assert written[0] == written[1]
