"""What is written as compressed-tensors is what its own library reads: the same codes, scales, weights and logits."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipeline import child
from pipeline.catalog import FORMATS, bits_per_weight
from pipeline.checkpoint import Checkpoint
from pipeline.errors import NonFinite
from pipeline.formats import compressed_tensors
from pipeline.formats.compressed_tensors_pack import config_of, pack, pack_floats, scheme_of
from pipeline.jobs import Job
from pipeline.kept import Donor, keep, made_from
from pipeline.manifest import read_content
from pipeline.quantization import engine, kept_whole
from pipeline.quantization.folder import Order
from pipeline.quantization.grids import nearest
from pipeline.quantization_config import Quantization
from pipeline.stages import upcast
from pipeline.target_layout import matches
from pipeline.targets import parse_target
from tests.checkpoints import tiny_llama
from tests.classifiers import tiny_head
from tests.formats.groups import packed

TARGETS = {
    "w4a16": "compressed-tensors:group_size=32",
    "channel": "compressed-tensors:group_size=-1,name=channel",
    "nearest": "compressed-tensors:group_size=32,rounding=nearest,name=nearest",
    "w8a8": "compressed-tensors:scheme=w8a8",
    "fp8": "compressed-tensors:scheme=fp8",
    "gptq": "gptq:group_size=32",
}
OURS = tuple(name for name in TARGETS if name != "gptq")
DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
SAMPLES = tuple(map(tuple, torch.randint(3, 255, (8, 48), generator=torch.Generator().manual_seed(0)).tolist()))


def random(outputs, inputs, seed=0):
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def read_by_library(tensors, scheme):
    """The dense weight, in the dtype of the scales."""
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(tensors, scheme)["weight"]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), outputs=st.integers(1, 70), groups=st.integers(1, 4), dtype=DTYPES,
    name=st.sampled_from(["w4a16", "channel", "w8a8"]),
)  # fmt: skip
def test_codes_come_back_as_they_were_chosen_here_and_in_the_library(seed, outputs, groups, dtype, name):
    target = parse_target(TARGETS[name])
    rounded = nearest(
        random(outputs, 32 * groups, seed), bits=target.bits, group_size=target.group_size, symmetric=True, dtype=dtype
    )
    scheme = scheme_of(target)
    tensors = pack(rounded, scheme)
    assert torch.equal(read_by_library(tensors, scheme), rounded.dense().to(dtype))
    group, quantization = packed(tensors), Quantization.parse(config_of(target, []))
    assert torch.equal(compressed_tensors.dequantize(group, quantization), rounded.dense())
    found = compressed_tensors.unpack(group, quantization)
    for part in ("codes", "scales", "zeros", "groups"):
        assert torch.equal(getattr(found, part), getattr(rounded, part)), part
        assert getattr(found, part).dtype == getattr(rounded, part).dtype, part


def test_codes_keep_their_places_whoever_chose_them():
    """The lowest and highest code, which no weight of a symmetric grid would be rounded to from far away."""
    target = parse_target("compressed-tensors:scheme=w8a8")
    rounded = nearest(random(2, 256), bits=8, group_size=-1, symmetric=True, dtype=torch.bfloat16)
    codes = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    tensors = pack(type(rounded)(**{**parts(rounded), "codes": codes}), scheme_of(target))
    assert torch.equal(tensors["weight"][0], (torch.arange(256) - 128).to(torch.int8))


def parts(rounded):
    return {name: getattr(rounded, name) for name in ("bits", "codes", "scales", "zeros", "groups")}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), outputs=st.integers(1, 9), inputs=st.integers(1, 40), dtype=DTYPES)
def test_floats_are_the_nearest_for_the_scale_as_it_is_stored(seed, outputs, inputs, dtype):
    weight = random(outputs, inputs, seed)
    scheme = scheme_of(parse_target(TARGETS["fp8"]))
    tensors = pack_floats(weight, scheme, dtype=dtype)
    assert tensors["weight_scale"].dtype == dtype
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    every = every[every.isfinite()] * tensors["weight_scale"].double().unsqueeze(-1)
    best = (every - weight.double().unsqueeze(-1)).abs().amin(-1)
    found = tensors["weight"].double() * tensors["weight_scale"].double()
    # The quotient is rounded to float32 first: a tie may fall to the other side.
    assert torch.allclose((found - weight.double()).abs(), best, rtol=1e-6, atol=0)
    assert torch.equal(
        read_by_library(tensors, scheme), (tensors["weight"].float() * tensors["weight_scale"].float()).to(dtype)
    )


def test_a_row_of_zeros_stays_zeros_and_a_weight_that_is_no_number_is_refused():
    scheme, weight = scheme_of(parse_target(TARGETS["fp8"])), random(3, 8)
    weight[1] = 0
    tensors = pack_floats(weight, scheme, dtype=torch.bfloat16)
    assert tensors["weight_scale"][1] == 1
    assert not tensors["weight"][1].float().any()
    for bad in (torch.nan, 1e9):
        weight[2, 3] = bad
        with pytest.raises(NonFinite, match="no float16 scale"):
            pack_floats(weight, scheme, dtype=torch.float16)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A model whose activations have channels that stand out, as those of trained models do."""
    folder = tiny_llama(tmp_path_factory.mktemp("dense"), hidden=64, intermediate=128)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, ::16] *= 30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def order(folder, dense, text, **more):
    target = parse_target(text)
    return Order(
        dense=dense, out=folder / "out", scratch=folder / "scratch", target=target,
        calibration=SAMPLES if target.calibrated else (), **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """Name → (order, what was said of it), of one run."""
    root = tmp_path_factory.mktemp("made")
    orders = {name: order(root / name, dense, text) for name, text in TARGETS.items()}
    return dict(zip(TARGETS, zip(orders.values(), engine.write([*orders.values()]), strict=True), strict=True))


@pytest.fixture(scope="module")
def upcasted(made, tmp_path_factory):
    """Name → the folder that the upcast stage makes of it."""
    folders = {}
    for name, (written, _) in made.items():
        job = Job(
            inputs={"source": written.out}, options={"dtype": "bfloat16"}, workspace=tmp_path_factory.mktemp("upcast")
        )
        (output,) = upcast.run(job)
        folders[name] = output.folder
    return folders


@pytest.mark.parametrize("name", OURS)
def test_an_upcast_gives_the_weights_that_the_library_decompresses(made, upcasted, dense, name):
    written, said = made[name]
    checkpoint = Checkpoint.open(written.out)
    modules = FORMATS["compressed-tensors"].packed_modules(checkpoint.tensors)
    tensors, found = (load_file(folder / "model.safetensors") for folder in (written.out, upcasted[name]))
    before, scheme = load_file(dense / "model.safetensors"), scheme_of(written.target)
    assert set(modules) == set(said.packed) == {name[: -len(".weight")] for name in before if "_proj.weight" in name}
    assert said.dense == ("lm_head", "model.embed_tokens")
    for module, parts in modules.items():
        held = {part.removeprefix("."): tensors[module + part] for part in parts}
        assert held["weight_scale"].dtype == torch.bfloat16
        assert torch.equal(found[f"{module}.weight"], read_by_library(held, scheme)), module
    for key in before.keys() - {f"{module}.weight" for module in modules}:
        assert torch.equal(tensors[key], before[key])
    plain = bits_per_weight(written.target)
    assert plain <= said.packed_bits_per_weight < plain + 0.6  # beside it: a scale an output, and the shape


@pytest.mark.parametrize("name", OURS)
def test_the_config_is_the_librarys_own_and_asks_for_what_the_plan_would_keep(made, name):
    written, _ = made[name]
    checkpoint = Checkpoint.open(written.out)
    raw = checkpoint.quantization.raw
    assert QuantizationConfig.model_validate(raw).model_dump(mode="json") == raw
    (group,) = raw["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert raw["ignore"] == ["lm_head"]
    inputs = group["input_activations"]
    if written.target.scheme == "w4a16":
        assert inputs is None
    else:
        assert (inputs["num_bits"], inputs["dynamic"], inputs["strategy"]) == (8, True, "token")
        assert inputs["type"] == ("float" if name == "fp8" else "int")
    others = {key for key, text in TARGETS.items() if matches(parse_target(text), checkpoint)}
    assert others == ({"w4a16", "nearest"} if name in {"w4a16", "nearest"} else {name})


@pytest.mark.slow
def test_plain_transformers_reloads_every_scheme_whole_and_says_what_its_weights_say(made, upcasted, dense):
    folders = [dense, *(folder for name in OURS for folder in (made[name][0].out, upcasted[name]))]
    found = child.run("tests.quantization.reloading:several", folders, "bfloat16")
    right = torch.tensor(found[0]["logits"])
    for name, packed_, plain in zip(OURS, found[1::2], found[2::2], strict=True):
        assert not any(packed_["report"].values()), (name, packed_["report"])
        logits, same = (torch.tensor(one["logits"]) for one in (packed_, plain))
        off = float((logits - same).std() / right.std())
        if made[name][0].target.scheme == "w4a16":
            assert off == 0, name
        else:
            # The library rounds each token's inputs too: integers by up to 1/254 of the largest, floats by up to 1/16
            # of each, both at random signs; the logits moved by 0.004 and 0.005 of their spread.
            assert 0 < off < 0.02, (name, off)
        assert 0 < float((logits - right).std() / right.std()) < 0.35, name


@pytest.mark.slow
def test_of_the_same_bits_it_says_as_nearly_what_the_dense_model_says_as_gptq(upcasted, dense):
    names = ("w4a16", "nearest", "w8a8", "fp8", "gptq")
    folders = [dense, *(upcasted[name] for name in names)]
    found = child.run("tests.quantization.reloading:several", folders, "float32", 8)
    logs = [torch.tensor(one["logits"]).log_softmax(-1) for one in found]
    away = {
        name: float((logs[0].exp() * (logs[0] - one)).sum(-1).mean()) for name, one in zip(names, logs[1:], strict=True)
    }
    assert away["w4a16"] < 1.1 * away["gptq"], away
    assert away["w4a16"] < 0.9 * away["nearest"], away
    assert away["w8a8"] < 0.05 * away["gptq"], away
    assert away["fp8"] < 0.5 * away["gptq"], away


def donor_of(made, dense, name):
    written, said = made[name]
    content = read_content(written.out)
    tensors = read_content(dense).tensors
    return Donor(
        reference="bot/earlier@v0001", folder=written.out, packed=content.packed, spared=frozenset(said.dense),
        made_from=made_from(written.target, said.packed, tensors),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["w4a16", "w8a8", "fp8"])
def test_what_training_did_not_touch_keeps_its_bytes(made, dense, tmp_path, name):
    donor, module = donor_of(made, dense, name), "model.layers.1.mlp.up_proj"
    tensors = load_file(dense / "model.safetensors")
    changed = tiny_llama(tmp_path / "changed", hidden=64, intermediate=128)
    save_file({**tensors, f"{module}.weight": -tensors[f"{module}.weight"]}, changed / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    shapes = {key: info.shape for key, info in Checkpoint.open(changed).tensors.items()}
    target = parse_target(TARGETS[name])
    kept = keep(target, shapes, read_content(changed).tensors, [donor])
    assert kept.modules.keys() == donor.packed.keys() - {module}
    engine.write([order(tmp_path, changed, TARGETS[name], kept=kept.modules)])
    found = read_content(tmp_path / "out").packed
    assert {key for key in found if found[key] != donor.packed[key]} == {module}
    whole = keep(target, shapes, read_content(dense).tensors, [donor])
    assert whole.described_by == donor


def test_a_classifier_made_of_copies_names_its_own_head(made, dense, tmp_path):
    donor = donor_of(made, dense, "fp8")
    sides = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
    head = tiny_head(tmp_path / "dense", "LlamaForTokenClassification", dtype="bfloat16", **sides)
    given_ = order(tmp_path, head, TARGETS["fp8"], kept=dict.fromkeys(donor.packed, donor), described_by=donor)
    kept_whole.write(given_)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert raw["ignore"] == ["lm_head", "score"]
    assert read_content(tmp_path / "out").packed == donor.packed
