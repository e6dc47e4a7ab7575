"""A projector is taken only with the backbone that it was sealed to."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import pairing
from pipeline.errors import CheckpointError
from pipeline.pairing import Description
from tests.checkpoints import tiny_llama

LINEAR = Description(
    kind="linear", pooling="mean", in_features=64, hidden_features=None, out_features=2, task="classification",
    classes=("no", "yes"),
)  # fmt: skip


def projected(folder, *, seed=0):
    tiny_llama(folder, hidden=64, intermediate=96, seed=seed)
    save_file({"output.weight": torch.full((2, 64), float(seed))}, folder / pairing.WEIGHTS)
    pairing.write_description(folder, LINEAR)
    pairing.seal(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return projected(tmp_path / "model")


def test_a_folder_is_projected_where_a_projector_lies_in_it(folder, tmp_path):
    assert pairing.is_projected(folder)
    assert not pairing.is_projected(tiny_llama(tmp_path / "plain", hidden=64, intermediate=96))


def test_a_sealed_pair_passes_and_says_what_it_is(folder):
    pairing.check(folder)
    assert pairing.read_description(folder) == LINEAR
    raw = json.loads((folder / pairing.DESCRIPTION).read_text())
    assert raw["classes"] == ["no", "yes"]
    assert len(raw["backbone"]) == len(raw["projector"]) == 64


def test_another_projector_is_refused(folder, tmp_path):
    other = projected(tmp_path / "other", seed=1)
    shutil.copyfile(other / pairing.WEIGHTS, folder / pairing.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"projector\.safetensors was changed since .*; take both from the same"):
        pairing.check(folder)


def test_another_backbone_is_refused_though_its_shapes_fit(folder, tmp_path):
    other = projected(tmp_path / "other", seed=1)
    shutil.copyfile(other / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="its weights were changed since"):
        pairing.check(folder)


def test_every_shard_counts(tmp_path):
    folder = projected(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    pairing.seal(folder)
    pairing.check(folder)
    changed = {name: tensors[name] + 1 for name in names[1::2]}
    save_file(changed, folder / "part-1.safetensors")
    with pytest.raises(CheckpointError, match="its weights were"):
        pairing.check(folder)


def test_a_projector_carried_to_another_backbone_is_sealed_to_that(folder, tmp_path):
    other = tiny_llama(tmp_path / "other", hidden=64, intermediate=96, seed=3)
    pairing.carry(folder, other)
    pairing.check(other)
    assert pairing.read_description(other) == LINEAR
    assert (other / pairing.WEIGHTS).read_bytes() == (folder / pairing.WEIGHTS).read_bytes()


def test_a_pair_that_was_never_sealed_is_refused(folder):
    pairing.write_description(folder, LINEAR)
    with pytest.raises(CheckpointError, match="never sealed"):
        pairing.check(folder)


@pytest.mark.parametrize("name", [pairing.WEIGHTS, pairing.DESCRIPTION])
def test_half_of_a_projector_is_refused_by_the_name_of_what_lacks(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        pairing.check(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "conv"}, "kind is 'conv', expected one of linear, mlp"),
        ({"pooling": None}, "pooling is None"),
        ({"task": "ranking"}, "task is 'ranking'"),
        ({"in_features": 0}, "in_features is 0, expected a whole number"),
        ({"out_features": True}, "out_features is True"),
        ({"kind": "mlp"}, "hidden_features is None"),
        ({"classes": [1, 2]}, "classes is"),
    ],
)
def test_a_description_that_says_nonsense_is_refused(folder, change, said):
    path = folder / pairing.DESCRIPTION
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=said):
        pairing.read_description(folder)


def test_a_description_that_is_no_json_is_refused(folder):
    (folder / pairing.DESCRIPTION).write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        pairing.check(folder)
