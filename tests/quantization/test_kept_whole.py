"""A folder of which every packed module is copied takes the rest from the parent, and starts no library."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.synthetic import PACKERS, TINY, write
from pipeline import pairing
from pipeline.checkpoint import Checkpoint
from pipeline.errors import NonFinite, ReloadMismatch
from pipeline.kept import Donor
from pipeline.manifest import read_content
from pipeline.quantization import kept_whole
from pipeline.quantization.folder import Order
from pipeline.targets import parse_target
from tests.checkpoints import tiny_llama
from tests.classifiers import tiny_head, tiny_projected

NORM = "model.norm.weight"


def donor_of(folder: Path) -> Donor:
    content = read_content(folder)
    return Donor(reference="bot/awq@v0001", folder=folder, made_from={}, packed=content.packed)


@pytest.fixture
def donor(tmp_path) -> Donor:
    write(tmp_path / "donor", "awq", TINY)
    return donor_of(tmp_path / "donor")


def order(tmp_path, dense: Path, donor: Donor, target: str = "awq") -> Order:
    return Order(
        dense=dense, out=tmp_path / "out", scratch=tmp_path / "scratch", target=parse_target(target),
        kept=dict.fromkeys(donor.packed, donor), described_by=donor,
    )  # fmt: skip


def dense_like(folder: Path) -> Path:
    """A dense Llama that has the donor's modules."""
    return tiny_llama(folder, layers=1)


def test_packed_tensors_are_the_donors_and_all_else_the_parents(tmp_path, donor):
    dense = dense_like(tmp_path / "dense")
    written = kept_whole.write(order(tmp_path, dense, donor))
    assert written.packed == tuple(sorted(donor.packed))
    assert read_content(tmp_path / "out").packed == donor.packed
    before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    left = before.keys() & after.keys()
    assert {f"{module}.weight" for module in donor.packed} == before.keys() - left
    assert all(torch.equal(before[name], after[name]) for name in left)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config") == PACKERS["awq"][1]
    assert config == Checkpoint.open(dense).config
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


def test_a_folded_layer_brings_its_norms_and_nothing_from_outside_of_it(tmp_path, donor):
    tensors = load_file(donor.folder / "model.safetensors")
    theirs = {name: torch.full_like(tensors[name], 3.0) for name in tensors if name.endswith("norm.weight")}
    save_file({**tensors, **theirs}, donor.folder / "model.safetensors")
    folded = replace(donor_of(donor.folder), folded=True)
    dense = dense_like(tmp_path / "dense")
    kept_whole.write(order(tmp_path, dense, folded))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name for name in theirs if torch.equal(found[name], theirs[name])} == theirs.keys() - {NORM}
    assert torch.equal(found["lm_head.weight"], load_file(dense / "model.safetensors")["lm_head.weight"])


def test_a_nan_among_the_parents_tensors_is_refused_by_name(tmp_path, donor):
    dense = dense_like(tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors[NORM][3] = float("nan")
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFinite, match=NORM):
        kept_whole.write(order(tmp_path, dense, donor))
    assert not list((tmp_path / "out").iterdir())


def test_a_donor_that_lost_a_module_is_refused(tmp_path, donor):
    dense = dense_like(tmp_path / "dense")
    module = min(donor.packed)
    tensors = load_file(donor.folder / "model.safetensors")
    save_file({name: value for name, value in tensors.items() if not name.startswith(module)},
              donor.folder / "model.safetensors")  # fmt: skip
    with pytest.raises(ReloadMismatch, match=module):
        kept_whole.write(order(tmp_path, dense, donor))
    assert not (tmp_path / "out").exists()


def test_a_projector_goes_along_sealed_to_the_new_weights(tmp_path, donor):
    dense = tiny_projected(tmp_path / "dense", "regression", dtype="bfloat16")
    write(tmp_path / "two", "awq", replace(TINY, layers=2))
    two = donor_of(tmp_path / "two")
    kept_whole.write(order(tmp_path, dense, two))
    pairing.check(tmp_path / "out")


def test_the_head_of_a_classifier_is_named_among_what_stays_dense(tmp_path):
    """Its bias comes last, so transformers would take the head for a layer like any other."""
    dense = tiny_head(tmp_path / "dense", "BertForSequenceClassification", dtype="bfloat16", num_hidden_layers=1)
    shapes = {name: info.shape for name, info in Checkpoint.open(dense).tensors.items()}
    tensors = load_file(dense / "model.safetensors")
    linears = [name for name, shape in shapes.items() if len(shape) == 2 and ".dense." in name]
    random = torch.Generator().manual_seed(0)
    for name in linears:
        packed = PACKERS["int8"][0](random, *tensors.pop(name).shape)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": tensor for part, tensor in packed.items()}
    shutil.copytree(dense, tmp_path / "donor")
    save_file(tensors, tmp_path / "donor" / "model.safetensors", metadata={"format": "pt"})
    raw = {**PACKERS["int8"][1], "llm_int8_skip_modules": ["other"]}
    config = json.loads((dense / "config.json").read_text())
    (tmp_path / "donor" / "config.json").write_text(json.dumps({**config, "quantization_config": raw}))
    donor = donor_of(tmp_path / "donor")
    kept_whole.write(order(tmp_path, dense, donor, "int8"))
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert found == {**raw, "llm_int8_skip_modules": ["classifier", "other"]}
