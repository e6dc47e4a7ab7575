"""Inspect tells everything that an upcast would stop at, and what can be made of what it would not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import synthetic
from flows import cli
from pipeline.checkpoint import Checkpoint
from pipeline.inspection import inspect
from tests.checkpoints import tiny_llama

MODULE = "model.layers.0.self_attn.o_proj"


@pytest.fixture
def gptq(tmp_path):
    synthetic.write(tmp_path / "gptq", "gptq", synthetic.TINY)
    return tmp_path / "gptq"


def edit(folder, *, remove=(), config=None, **tensors):
    path = folder / "model.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(path).items() if name not in remove}
    save_file(stored | tensors, path, metadata={"format": "pt"})
    kept = json.loads((folder / "config.json").read_text())
    kept["quantization_config"] |= config or {}
    (folder / "config.json").write_text(json.dumps(kept))
    return Checkpoint.open(folder)


def test_a_quantized_checkpoint_in_facts(gptq):
    facts = inspect(Checkpoint.open(gptq))
    assert (facts.format, facts.layout, facts.bits, facts.group_size) == ("GPTQ", "gptq", {4: 7}, 128)
    assert (facts.architecture, facts.symmetric, facts.shards) == ("LlamaForCausalLM", True, 1)
    assert facts.parameters == synthetic.TINY.parameters
    assert facts.bytes_as_bfloat16 == 2 * synthetic.TINY.parameters
    assert facts.problems == ()
    assert facts.trainable == "adapters on top, or after an upcast"
    expected = {"nf4", "int8", "gptq-4bit", "awq-4bit", "w4a16", "w8a8", "fp8", "gguf-q8_0"}
    assert set(facts.becomes) == expected
    assert facts.becomes["nf4"] == ""
    assert "has no tokenizer.json" in facts.becomes["gguf-q8_0"]


def test_a_dense_checkpoint_in_facts(tmp_path):
    facts = inspect(Checkpoint.open(tiny_llama(tmp_path)))
    assert (facts.format, facts.bits, facts.group_size, facts.layout) == ("bf16, fp16, fp32", {}, None, None)
    assert (facts.trainable, facts.problems) == ("every weight, or adapters", ())


def test_all_that_is_wrong_is_told_at_once(gptq):
    facts = inspect(
        edit(
            gptq,
            remove=[f"{MODULE}.scales", "model.layers.0.mlp.up_proj.qzeros"],
            extra=torch.zeros(1),
        )
    )
    assert len(facts.problems) == 3
    assert any(f"{MODULE}: scales is in no shard" in problem for problem in facts.problems)
    assert any("mlp.up_proj: qzeros is in no shard" in problem for problem in facts.problems)
    assert any("extra: llama has no place for it" in problem for problem in facts.problems)
    assert facts.becomes == {}


def test_bits_are_counted_by_module(gptq):
    packed = synthetic.PACKERS["gptq"][0](torch.Generator(), 128, 128)
    eight = {f"{MODULE}.qweight": torch.zeros(32, 128, dtype=torch.int32),
             f"{MODULE}.qzeros": torch.zeros(1, 32, dtype=torch.int32)}  # fmt: skip
    assert packed["qweight"].shape == (16, 128)
    facts = inspect(edit(gptq, config={"dynamic": {f"+:{MODULE}": {"bits": 8}}}, **eight))
    assert facts.bits == {4: 6, 8: 1}
    assert facts.problems == ()


def test_what_an_upcast_would_leave_out_is_told(gptq):
    facts = inspect(edit(gptq, **{f"{MODULE}.bias": torch.zeros(128)}))
    assert facts.dropped == {f"{MODULE}.bias": "a bias of zeros that the architecture does not have"}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "aqlm"}, "quant_method aqlm cannot be read"),
        ({"bits": 5}, "gptq with bits 5 cannot be read"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format marlin"),
    ],
)
def test_a_format_that_cannot_be_read_is_a_problem_with_a_sentence(gptq, config, said):
    facts = inspect(edit(gptq, config=config))
    assert said in facts.problems[0]
    assert len(facts.problems) == len(set(facts.problems))


def test_an_unknown_architecture_is_a_problem_and_the_sizes_are_still_told(gptq):
    config = json.loads((gptq / "config.json").read_text()) | {"model_type": "marvel", "architectures": ["Marvel"]}
    (gptq / "config.json").write_text(json.dumps(config))
    facts = inspect(Checkpoint.open(gptq))
    assert "cannot build model_type 'marvel'" in facts.problems[0]
    assert facts.parameters == synthetic.TINY.parameters


def test_the_command_prints_a_line_for_each_fact_and_each_problem(gptq, capsys):
    edit(gptq, remove=[f"{MODULE}.scales"])
    assert cli.run(["inspect", str(gptq)]) == 0
    said = capsys.readouterr().out
    assert "format           GPTQ, gptq" in said
    assert "bits             4 (7 modules)" in said
    assert f"wrong            {MODULE}: scales is in no shard" in said
    assert "becomes" not in said


@pytest.mark.parametrize("named", [7, {"model": 1}, [], [None], "x"])
def test_architectures_of_another_kind_are_no_obstacle(tmp_path, named):
    config = json.loads((tiny_llama(tmp_path, layers=1) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": named}))
    assert inspect(Checkpoint.open(tmp_path)).architecture in {"llama", "None"}
