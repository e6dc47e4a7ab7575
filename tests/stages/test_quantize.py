"""Quantize checks every target before it makes the first, and gives each up as soon as it is written."""

import importlib
import importlib.util
import json
import shutil
from dataclasses import replace

import pytest

from pipeline import child
from pipeline.catalog import FORMATS
from pipeline.checkpoint import Checkpoint
from pipeline.errors import DataError, MissingLibrary, UnsupportedFormat
from pipeline.jobs import Job
from pipeline.quantization import writers
from pipeline.quantization.reloaded import Reloaded
from pipeline.sections import Data
from pipeline.stages import quantize
from tests.checkpoints import tiny_llama

NF4 = {"format": "bitsandbytes"}
INT8 = {"format": "bitsandbytes", "bits": 8, "name": "small"}
RELOADED = Reloaded(modules=7, module="", module_deviation=0.0, deviation=None, bound=0.0, seconds=0.0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("dense"), layers=1)


@pytest.fixture
def orders(monkeypatch):
    """The orders that reach a writer's process, none of which is started."""
    seen = []

    def run(_, given, **__):
        seen.extend(given if isinstance(given, list) else [given])
        raise RuntimeError("no process in this test")

    monkeypatch.setattr(child, "run", run)
    return seen


def job(dense, workspace, *targets, data=None, samples=4, sequence_length=16):
    return Job(
        inputs={"dense": dense},
        options={
            "targets": list(targets),
            "calibration": {"samples": samples, "sequence_length": sequence_length},
            "seed": 0,
        },
        workspace=workspace,
        data={"calibration": Data(path=str(data))} if data else {},
    )


def rows(path, count):
    path.write_text("".join(json.dumps({"text": f"the sum of {i} and {i + 1}"}) + "\n" for i in range(count)))
    return path


@pytest.fixture
def in_process(monkeypatch):
    """Have writers and checks work in this process: a child costs more than all that it does to a tiny model."""

    def run(function, given, **_):
        module, _, name = function.partition(":")
        return getattr(importlib.import_module(module), name)(given)

    monkeypatch.setattr(child, "run", run)


def test_each_target_is_an_output_as_soon_as_it_is_written_and_reloads(dense, tmp_path, in_process):
    outputs = quantize.run(job(dense, tmp_path, NF4, INT8))
    first = next(outputs)
    assert (first.variant, first.folder.name) == ("nf4", "nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["nf4"]
    assert Checkpoint.open(first.folder).quantization.bits == 4
    second = next(outputs)
    assert second.variant == "small"
    packed = FORMATS["bnb-int8"].packed_modules(Checkpoint.open(second.folder).tensors)
    assert second.metrics["packed_modules"] == len(packed) == 7
    assert 8 < second.metrics["packed_bits_per_weight"] < second.metrics["bits_per_weight"] < 16
    assert second.notes == {"dense": ["lm_head", "model.embed_tokens"]}
    assert next(outputs, None) is None


def test_no_target_is_made_where_one_has_a_group_size_that_does_not_fit(tmp_path, orders):
    dense = tiny_llama(tmp_path / "dense", layers=1, intermediate=96)
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    data = rows(tmp_path / "rows.jsonl", 50)
    with pytest.raises(UnsupportedFormat, match=r"awq-4bit: group_size 64 .* 96 inputs of .*down_proj.*16, 32"):
        next(quantize.run(job(dense, workspace, NF4, {"format": "awq", "group_size": 64}, data=data)))
    assert not orders
    assert not list(workspace.iterdir())


def test_a_missing_library_is_named_with_the_command_that_installs_it(dense, tmp_path, orders, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gptqmodel" else found(name))
    with pytest.raises(MissingLibrary, match=r"gptqmodel.*pip install 'requant\[gptqmodel\]'"):
        next(quantize.run(job(dense, tmp_path, NF4, {"format": "gptq"}, data=rows(tmp_path / "rows.jsonl", 50))))
    assert not orders


def test_autoawq_is_asked_for_where_it_is_missing(dense, tmp_path, orders, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "awq" else found(name))
    with pytest.raises(MissingLibrary, match=r"awq-4bit: engine autoawq is not installed; .*'requant\[autoawq\]'"):
        target = {"format": "awq", "engine": "autoawq"}
        next(quantize.run(job(dense, tmp_path, target, data=rows(tmp_path / "rows.jsonl", 50))))
    assert not orders


def test_a_quantized_parent_is_refused(dense, tmp_path, in_process):
    (output,) = quantize.run(job(dense, tmp_path, NF4))
    with pytest.raises(UnsupportedFormat, match=r"quantized already \(bitsandbytes\)"):
        next(quantize.run(job(output.folder, tmp_path / "again", INT8)))


def test_gptq_gets_the_calibration_rows_as_token_ids_and_bitsandbytes_none(dense, tmp_path, orders):
    data = rows(tmp_path / "rows.jsonl", 50)
    for target in (NF4, {"format": "gptq", "group_size": 32}):
        with pytest.raises(RuntimeError):
            next(quantize.run(job(dense, tmp_path, target, data=data)))
    none, some = orders
    assert none.calibration == ()
    assert [len(sample) for sample in some.calibration] == [16] * 4
    assert all(isinstance(token, int) and 0 <= token < 256 for sample in some.calibration for token in sample)


def mixture(job_, *sources, samples):
    """The job with several sources of calibration rows."""
    options = {**job_.options, "calibration": {"samples": samples, "sequence_length": 16}}
    data = {f"calibration_{i}": Data(path=str(path)) for i, path in enumerate(sources, start=1)}
    return replace(job_, options=options, data=data)


def test_mixed_sources_reach_the_writer_and_are_noted(dense, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(child, "run", lambda _, given, **__: seen.extend(given) or [None])
    monkeypatch.setattr(writers, "reload", lambda made: [RELOADED] * len(made))
    monkeypatch.setattr(quantize, "_metrics", lambda _: {})
    monkeypatch.setattr(quantize, "_notes", lambda *_: {"dense": []})
    one, other = rows(tmp_path / "one.jsonl", 50), rows(tmp_path / "other.jsonl", 50)
    given = mixture(job(dense, tmp_path, {"format": "gptq", "group_size": 32}), one, other, samples=[3, 1])
    (output,) = quantize.run(given)
    assert [len(sample) for sample in seen[0].calibration] == [16] * 4
    assert output.notes == {
        "dense": [],
        "calibration": {
            "calibration_1": {"rows": "one.jsonl", "samples": 3, "tokens": 48},
            "calibration_2": {"rows": "other.jsonl", "samples": 1, "tokens": 16},
        },
    }


def test_a_source_that_yields_less_than_its_share_is_refused_before_a_process_starts(dense, tmp_path, orders):
    one, other = rows(tmp_path / "one.jsonl", 50), rows(tmp_path / "other.jsonl", 2)
    given = mixture(job(dense, tmp_path, {"format": "gptq", "group_size": 32}), one, other, samples=[3, 9])
    with pytest.raises(DataError, match=r"other.jsonl: the rows fill \d samples of 16 tokens, their share is 9"):
        next(quantize.run(given))
    assert not orders


def test_targets_of_one_engine_are_one_call_and_every_other_is_its_own(dense, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(child, "run", lambda name, given, **_: calls.append((name, given)) or [None] * 2)
    data, gptq = rows(tmp_path / "rows.jsonl", 50), {"format": "gptq", "group_size": 32}
    targets = [gptq, NF4, {"format": "awq", "group_size": 32}, {**gptq, "engine": "gptqmodel", "name": "theirs"}]
    monkeypatch.setattr(writers, "reload", lambda made: [RELOADED] * len(made))
    monkeypatch.setattr(quantize, "_metrics", lambda _: {})
    monkeypatch.setattr(quantize, "_notes", lambda *_: {})
    outputs = list(quantize.run(job(dense, tmp_path, *targets, data=data)))
    assert [output.variant for output in outputs] == ["nf4", "theirs", "gptq-4bit", "awq-4bit"]
    assert [name.rpartition(".")[2] for name, _ in calls] == ["bitsandbytes:write", "gptqmodel:write", "engine:write"]
    assert [order.target.format for order in calls[2][1]] == ["gptq", "awq"]


def test_too_little_calibration_text_is_refused_before_a_process_starts(dense, tmp_path, orders):
    data = rows(tmp_path / "rows.jsonl", 1)
    with pytest.raises(DataError, match=r"calibration.*fewer than one sample"):
        next(quantize.run(job(dense, tmp_path, {"format": "awq"}, data=data, sequence_length=64)))
    assert not orders


@pytest.mark.parametrize(
    ("vocab", "text", "said"),
    [(40, "sums", r"the tokenizer gives token \d+, the model knows 40 of them"),
     (256, "<pad>" * 40, "every token of the rows is padding")],
)  # fmt: skip
def test_calibration_rows_that_say_nothing_to_the_model_are_refused(dense, tmp_path, orders, vocab, text, said):
    copy, data = tmp_path / "dense", tmp_path / "rows.jsonl"
    shutil.copytree(dense, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": vocab}))
    data.write_text(json.dumps({"text": text * 20}) + "\n")
    stage = quantize.run(job(copy, tmp_path, {"format": "gptq", "group_size": 32}, data=data))
    with pytest.raises(DataError, match=said):
        next(stage)
    assert not orders
