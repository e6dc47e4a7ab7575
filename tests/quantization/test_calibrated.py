"""GPTQ and AWQ folders, whichever engine rounds, load in transformers with nothing missing or left over."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import child, progress
from pipeline.checkpoint import Checkpoint
from pipeline.quantization import writers
from pipeline.quantization.folder import Order
from pipeline.targets import AWQTarget, GPTQTarget
from tests.checkpoints import tiny_llama

TARGETS = {
    f"{engine} {target.__name__}": target(format=form, group_size=32, engine=engine)
    for engine in ("requant", "gptqmodel")
    for form, target in (("gptq", GPTQTarget), ("awq", AWQTarget))
}
if importlib.util.find_spec("awq"):
    TARGETS["autoawq AWQTarget"] = AWQTarget(format="awq", group_size=32, engine="autoawq")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model whose activations have channels that stand out, as those of trained models do and AWQ is made for."""
    folder = tiny_llama(tmp_path_factory.mktemp("dense"), dtype="float16")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, ::16] *= 30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=TARGETS)
def made(request, dense, tmp_path_factory):
    """(order, what the writer said of it, the events that it sent), for each target."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, 255, (8, 64), generator=generator).tolist()
    folder = tmp_path_factory.mktemp(request.param)
    order = Order(
        dense=dense, out=folder / "out", scratch=folder / "scratch", target=TARGETS[request.param],
        calibration=tuple(map(tuple, rows)),
    )  # fmt: skip
    events = []
    with progress.shown_by(events.append):
        (((_, written),),) = writers.write([order])
        return order, written, events


@pytest.mark.slow
def test_fresh_processes_reload_it_whole_and_agree_to_the_last_bit(made, dense):
    order, _, _ = made
    first, second = (child.run("tests.quantization.reloading:logits", order.out, "float16") for _ in range(2))
    assert not any(first["report"].values()), first["report"]
    assert first["logits"] == second["logits"]
    kinds = first["modules"]
    assert kinds["lm_head"] == "Linear"
    assert kinds["model.layers.1.mlp.down_proj"] != "Linear"
    right = torch.tensor(child.run("tests.quantization.reloading:logits", dense, "float16")["logits"])
    error = (torch.tensor(first["logits"]) - right).std() / right.std()
    # Both move the logits by 0.02 of their spread; AWQ that loses its weights in the scale search by 0.27.
    assert 0 < error < 0.05


@pytest.mark.slow
def test_every_linear_layer_is_packed_and_nothing_is_added(made, dense):
    order, written, _ = made
    tensors, before = load_file(order.out / "model.safetensors"), load_file(dense / "model.safetensors")
    parts = ["qweight", "qzeros", "scales"] + (["g_idx"] if order.target.format == "gptq" else [])
    layers = [name.removesuffix(".weight") for name in before if name.endswith("_proj.weight")]
    assert sorted(written.packed) == sorted(layers)
    assert written.dense == ("lm_head", "model.embed_tokens")
    kept = {name for name in before if not name.endswith("_proj.weight")}
    assert set(tensors) == kept | {f"{layer}.{part}" for layer in layers for part in parts}
    assert all(tensors[name].dtype == before[name].dtype for name in kept)
    assert torch.equal(tensors["lm_head.weight"], before["lm_head.weight"])


@pytest.mark.slow
def test_the_config_says_what_the_weights_are_and_nothing_of_the_machine(made, dense):
    order, _, _ = made
    config = json.loads((order.out / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == Checkpoint.open(dense).config
    assert quantization["quant_method"] == order.target.format
    assert (quantization["bits"], quantization["group_size"]) == (4, 32)
    assert list(quantization["meta"]) == ["quantizer"]
    if order.target.format == "awq":
        assert quantization["zero_point"] is True
        assert quantization["version"] == "gemm"
    else:
        assert quantization["checkpoint_format"] == "gptq"
        assert quantization["sym"] is True
    assert sorted(path.name for path in order.out.iterdir()) == sorted(path.name for path in dense.iterdir())
    assert not order.scratch.exists()


@pytest.mark.slow
def test_each_layer_is_an_event(made):
    order, _, events = made
    steps = [event for event in events if isinstance(event, progress.Step)]
    assert [(step.done, step.total) for step in steps] == [(1, 2), (2, 2)]
    assert {step.unit for step in steps} == {f"{order.target.variant} layers"}


@pytest.mark.slow
def test_the_same_order_gives_the_same_bytes(made, tmp_path):
    order, _, _ = made
    again = replace(order, out=tmp_path / "again", scratch=tmp_path / "scratch")
    list(writers.write([again]))
    for path in order.out.iterdir():
        assert path.read_bytes() == (again.out / path.name).read_bytes(), path.name
