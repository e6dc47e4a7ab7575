"""A quantized folder is committed only if it reloads as the model that was meant; what is wrong is named."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import child, execute
from pipeline.artifacts import Store
from pipeline.checkpoint import Checkpoint
from pipeline.digests import digest_tensors
from pipeline.errors import ReloadMismatch
from pipeline.evaluation.tasks import ENVIRONMENT
from pipeline.formats import bnb_4bit, bnb_int8, gptq
from pipeline.jobs import Job
from pipeline.manifest import Origin
from pipeline.quantization import bitsandbytes, engine, gguf
from pipeline.quantization.folder import Order
from pipeline.quantization.reload import check
from pipeline.quantization.reloaded import Reload, Reloaded
from pipeline.stages import quantize
from pipeline.targets import parse_target
from tests.checkpoints import tiny_llama
from tests.classifiers import tiny_head, tiny_projected

MODULE = "model.layers.0.mlp.down_proj"
ROWS = tuple(tuple(range(3 + i, 35 + i)) for i in range(6))
OWN = ("gptq:group_size=32", "awq:group_size=32", "gptq:group_size=32,rounding=nearest", "gptq:bits=8,group_size=-1",
       "gptq:bits=auto,bits_per_weight=4.9,group_size=32")  # fmt: skip


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("dense"), hidden=64, intermediate=128, layers=1)


def order(folder, dense, text):
    target = parse_target(text)
    return Order(
        dense=dense, out=folder / text, scratch=folder / f"{text}.scratch", target=target,
        calibration=ROWS if target.calibrated else (),
    )  # fmt: skip


def written(folder, dense, text) -> Reload:
    """A folder as its writer left it."""
    one = order(folder, dense, text)
    alone = {"bitsandbytes": bitsandbytes.write, "gguf": gguf.write}.get(one.target.format)
    (made,) = [alone(one)] if alone else engine.write([one])
    return Reload.of(one, made)


def changed(reload: Reload, change) -> Reload:
    """Its tensors after `change`, which may replace, drop or add some."""
    path = reload.folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return reload


def as_if_meant(reload: Reload) -> Reload:
    """The same, with what lies on the disk now as what was handed over."""
    checkpoint = Checkpoint.open(reload.folder)
    places = {name: (reload.folder / checkpoint.weight_map[name], info) for name, info in checkpoint.tensors.items()}
    return replace(reload, digests=digest_tensors(places))


def mismatch(reload: Reload) -> str:
    (found,) = check([reload])
    assert isinstance(found, ReloadMismatch), found
    return str(found)


@pytest.mark.parametrize("text", ["nf4", "fp4", "bitsandbytes:double_quant=false", "int8"])
def test_what_the_writers_of_bitsandbytes_write_reloads(tmp_path, dense, text):
    (found,) = check([written(tmp_path, dense, text)])
    assert isinstance(found, Reloaded), found
    assert found.modules == 7
    assert 0 < found.module_deviation < 0.02
    assert 0 < found.deviation < found.bound < 0.1
    assert found.metrics.keys() == {"reload_module_deviation", "reload_deviation", "reload_seconds"}


def test_of_a_model_that_does_not_fit_the_memory_the_files_are_compared_and_it_says_so(tmp_path, dense, monkeypatch):
    one = written(tmp_path, dense, "nf4")
    monkeypatch.setattr("pipeline.quantization.reload.memory_left", lambda: 1000)
    (found,) = check([one])
    assert isinstance(found, Reloaded), found
    assert found.metrics.keys() == {"reload_seconds"}
    assert found.notes == {"reload": "was not loaded: its 0.0 GB do not fit the 0.0 GB of memory that are left"}
    assert found.sentence("nf4").startswith("nf4: lies on the disk as it was meant, but was not loaded")
    digests = {**one.digests, "another.weight": "0"}
    assert "another.weight: is not on the disk" in mismatch(replace(one, digests=digests))


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_for_vllm_reloads(tmp_path, scheme, dtype):
    """In float32 to the last bit: the rounding of inputs is known; in 16 bits the scales of inputs are rounded too."""
    dense = tiny_llama(tmp_path / "dense", hidden=64, intermediate=128, layers=1, dtype=dtype)
    group = ",group_size=32" if scheme == "w4a16" else ""
    (found,) = check([written(tmp_path, dense, f"compressed-tensors:scheme={scheme}{group}")])
    assert isinstance(found, Reloaded), found
    assert found.modules == 7
    assert (found.module_deviation < 1e-6) == (dtype == "float32")


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_a_gguf_file_reloads_as_its_blocks_say(tmp_path, dense, kind):
    reload = written(tmp_path, dense, f"gguf:type={kind}")
    (found,) = check([reload])
    assert isinstance(found, Reloaded), found
    assert (found.modules, found.module_deviation) == (9, 0)
    (path,) = reload.folder.glob("*.gguf")
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert "is not on the disk as it was written" in mismatch(reload)


@pytest.mark.slow
def test_what_the_engine_packs_reloads_one_process_for_all(tmp_path, dense):
    reloads = [written(tmp_path, dense, text) for text in OWN]
    dropped = replace(reloads[0], digests={**reloads[0].digests, "another.weight": "0"})
    *found, last = child.run("pipeline.quantization.reload:check", [*reloads, dropped], environment=ENVIRONMENT)
    assert [getattr(one, "modules", one) for one in found] == [7] * len(OWN)
    assert all(0 < one.deviation < one.bound < 0.1 for one in found)
    assert "another.weight: is not on the disk" in str(last)


@pytest.mark.parametrize(
    ("architecture", "text"), [("LlamaForSequenceClassification", "nf4"), ("BertForTokenClassification", "int8")]
)
def test_classifiers_and_taggers_are_asked_for_what_they_give(tmp_path, architecture, text):
    dense = tiny_head(tmp_path / "dense", architecture, dtype="bfloat16")
    (found,) = check([written(tmp_path, dense, text)])
    assert isinstance(found, Reloaded), found
    assert 0 < found.deviation < found.bound


def test_a_projector_is_checked_against_its_backbone_too(tmp_path):
    reload = written(tmp_path, tiny_projected(tmp_path / "dense", "pairs", dtype="bfloat16"), "nf4")
    (found,) = check([reload])
    assert isinstance(found, Reloaded), found
    name = "model.norm.weight"
    changed(reload, lambda tensors: tensors.update({name: tensors[name] * 2}))
    assert "sealed" in mismatch(as_if_meant(reload))


def flip(tensors):
    """One bit of one code."""
    tensors[f"{MODULE}.qweight"][0, 0] ^= 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip, f"{MODULE}.qweight: is not on the disk as it was written"),
        (lambda tensors: tensors[f"{MODULE}.scales"][0].mul_(1.001), f"{MODULE}.scales: is not on the disk as it was"),
        (lambda tensors: tensors.pop(f"{MODULE}.qzeros"), f"{MODULE}.qzeros: is not on the disk;"),
        (lambda tensors: tensors.update({f"{MODULE}.weight": torch.ones(2, 2)}), f"{MODULE}.weight: was never written"),
    ],
)
def test_what_changed_after_it_was_written_is_named(tmp_path, dense, change, said):
    reload = written(tmp_path, dense, "gptq:group_size=32,rounding=nearest")
    assert mismatch(changed(reload, change)).startswith(f"rtn-4bit: {said}")


def test_a_config_of_another_group_size_is_no_description_of_the_tensors(tmp_path, dense):
    reload = written(tmp_path, dense, "gptq:group_size=32,rounding=nearest")
    path = reload.folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["group_size"] = 64
    path.write_text(json.dumps(config))
    assert "_proj: qzeros has shape" in mismatch(reload)


@pytest.mark.parametrize(("text", "reader"), [("nf4", bnb_4bit), ("int8", bnb_int8)])
def test_a_kernel_that_computes_with_other_weights_is_named_by_its_module(tmp_path, dense, text, reader, monkeypatch):
    """One row of one module a fifth larger than its reader has it."""
    read = reader.dequantize

    def larger(group, *rest):
        found = read(group, *rest)
        if group.module == MODULE:
            found[5] *= 1.2
        return found

    reload = written(tmp_path, dense, text)
    monkeypatch.setattr(reader, "dequantize", larger)
    assert f"{text}: {MODULE}: gives outputs that are off by" in mismatch(reload)


def test_a_model_whose_modules_are_right_and_whose_answer_is_not_is_refused(tmp_path, dense, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    reload = written(tmp_path, dense, "nf4")
    forward = LlamaRMSNorm.forward
    in_bfloat16 = torch.bfloat16  # the loaded model's; what it is compared with computes in float32
    monkeypatch.setattr(
        LlamaRMSNorm, "forward", lambda norm, x: forward(norm, x) * (1.0 if x.dtype != in_bfloat16 else x.abs() + 1)
    )
    assert "nf4: the reloaded model's answer is off by" in mismatch(reload)


@pytest.mark.parametrize("text", ["nf4", "int8"])
def test_a_layer_that_is_silently_dense_is_named(tmp_path, dense, text):
    """Where a dense weight lies in its place, transformers packs it by itself and says nothing."""
    reload = written(tmp_path, dense, text)
    weight = load_file(dense / "model.safetensors")[f"{MODULE}.weight"]

    def unpack(tensors):
        for name in [name for name in tensors if name.startswith(f"{MODULE}.")]:
            del tensors[name]
        tensors[f"{MODULE}.weight"] = weight

    assert f"{MODULE}" in mismatch(changed(reload, unpack))
    assert f"{MODULE}: is stored dense" in mismatch(as_if_meant(reload))


def test_codes_that_do_not_come_back_from_their_layout_end_the_engine(tmp_path, dense, monkeypatch):
    pack = gptq.pack

    def wrong(rounded):
        tensors = dict(pack(rounded))
        flip({f"{MODULE}.qweight": tensors["qweight"]})
        return tensors

    monkeypatch.setattr(gptq, "pack", wrong)
    with pytest.raises(ReloadMismatch, match=r"^model\.layers\.0\.\S+: its packed tensors do not give"):
        engine.write([order(tmp_path, dense, "gptq:group_size=32,rounding=nearest")])
    assert not (tmp_path / "gptq:group_size=32,rounding=nearest").exists()


def test_what_does_not_reload_is_not_committed_and_what_was_stays(tmp_path, dense, monkeypatch):
    def damaging(function, given, **_):
        module, _, name = function.partition(":")
        found = getattr(importlib.import_module(module), name)(given)
        if function.endswith("bitsandbytes:write") and given.target.bits == 8:
            path = given.out / "model.safetensors"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        return found

    monkeypatch.setattr(child, "run", damaging)
    targets = [parse_target(text) for text in ("nf4", "int8")]
    store = Store(tmp_path / "store")
    origin = Origin(stage="quantize", stage_version=1, options={}, parents={}, data={})
    options = {"targets": [target.model_dump() for target in targets], "calibration": {}, "seed": 0}
    (tmp_path / "work").mkdir()
    task = execute.Work(
        stage="quantize", only=None, store=store.root, name="bot", parents={},
        job=Job(inputs={"dense": dense}, options=options, workspace=tmp_path / "work"),
        origins={target.variant: replace(origin, options={"v": target.variant}) for target in targets},
    )  # fmt: skip
    with pytest.raises(ReloadMismatch, match=r"int8: \S+: is not on the disk as it was written"):
        execute.work(task)
    assert [path.name for path in Path(store.root, "bot").iterdir()] == ["nf4"]
    metrics = store.resolve("bot/nf4").manifest.metrics
    assert 0 < metrics["reload_module_deviation"] < 0.02
    assert 0 < metrics["reload_deviation"] < 0.1
    assert metrics["reload_seconds"] > 0


def test_every_target_of_a_process_that_reloads_is_an_output_before_the_error(tmp_path, dense, monkeypatch):
    def answer(function, given, **_):
        if function.endswith("reload:check"):
            good = Reloaded(modules=7, module=MODULE, module_deviation=0, deviation=None, bound=0, seconds=0)
            return [ReloadMismatch(f"{given[0].variant}: is wrong"), *(good for _ in given[1:])]
        return engine.write(given)

    monkeypatch.setattr(child, "run", answer)
    nearest = {"format": "gptq", "rounding": "nearest", "group_size": 32}
    options = {"targets": [{**nearest, "name": "first"}, {**nearest, "name": "second"}], "seed": 0}
    found = quantize.run(Job(inputs={"dense": dense}, options=options, workspace=tmp_path))
    assert next(found).variant == "second"
    with pytest.raises(ReloadMismatch, match="first: is wrong"):
        next(found)
