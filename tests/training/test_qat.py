"""Quantization-aware training: the forward pass sees the target's grid, the weights stay their own."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline.encoding import encode, load_tokenizer, padded
from pipeline.errors import RecipeError
from pipeline.rows import read_rows
from pipeline.stages import train
from pipeline.training import qat
from pipeline.training.checks import loss_of, sample_of
from tests.checkpoints import tiny_llama
from tests.training.runs import training_job

GRID = {"bits": 4, "group_size": 32, "symmetric": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "model", hidden=64, intermediate=96)


def model(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.mark.parametrize(
    "grid",
    [GRID, GRID | {"symmetric": True}, GRID | {"bits": 8}, {"bits": 3, "group_size": -1, "symmetric": True}],
)
def test_a_layer_computes_with_its_weights_on_the_grid_and_the_head_does_not(base, grid):
    made = model(base)
    own = made.model.layers[0].mlp.up_proj.weight.detach().clone()
    names = list(made.state_dict())
    qat.prepare(made, grid, dense=())
    seen = made.model.layers[0].mlp.up_proj(torch.eye(64)).T.detach()  # the weights that it computes with
    group = 64 if grid["group_size"] == -1 else grid["group_size"]
    for weights, groups in zip(own.reshape(-1, group), seen.reshape(-1, group), strict=True):
        span = 2 * weights.abs().max() if grid.get("symmetric") else weights.max() - weights.min()
        assert len(groups.unique()) <= 2 ** grid["bits"]
        assert (groups - weights).abs().max() <= 1.01 * span / (2 ** grid["bits"] - 1)
    assert not torch.equal(seen, own)
    assert type(made.lm_head) is torch.nn.Linear
    assert list(made.state_dict()) == names
    assert torch.equal(made.model.layers[0].mlp.up_proj.weight, own)


def test_the_gradient_reaches_the_weights_through_the_rounding(base):
    made = model(base)
    qat.prepare(made, GRID, dense=())
    ids = torch.randint(3, 250, (2, 16))
    made(input_ids=ids, labels=ids).loss.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in made.parameters())


def test_what_trains_is_the_loss_on_the_grid_and_what_is_written_is_dense(base, tmp_path):
    job = training_job(base, tmp_path, method="qat", max_steps=20, learning_rate=2e-3)
    job.options["grid"] = {"bits": 2, "group_size": 32, "symmetric": False}
    [output] = train.run(job)
    assert load_file(output.folder / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    tokenizer = load_tokenizer(base, trust_remote_code=False)
    sample = sample_of(encode(read_rows(job.data["train"]), tokenizer, sequence_length=32).items)
    losses = {}
    for name in ("as written", "on the grid"):
        judged = model(output.folder)
        if name == "on the grid":
            qat.prepare(judged, job.options["grid"], dense=())
        losses[name] = loss_of(judged, [padded(sample, pad_token=0)], device=torch.device("cpu"))
    assert losses["on the grid"] == pytest.approx(output.metrics["sample_loss_after"], rel=5e-3)
    assert abs(losses["as written"] - losses["on the grid"]) > 5e-3 * losses["on the grid"]


def test_a_grid_that_torchao_has_not_is_one_sentence(base):
    with pytest.raises(RecipeError, match="torchao has no fake quantization for 9 bits"):
        qat.prepare(model(base), {"bits": 9, "group_size": 32}, dense=())
