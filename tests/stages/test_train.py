"""Training: an adapter or tuned weights, the same after a kill as without one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pipeline import progress
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, DataError, NonFinite, RecipeError, UnsupportedFormat
from pipeline.sections import Data
from tests.checkpoints import tiny_llama, with_chat_template
from tests.training.runs import ARGUMENTS, LORA, Killed, contents, dies_at, rows, trained


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "model", hidden=64, intermediate=96)


def test_lora_gives_an_adapter_that_peft_loads_and_events_on_the_way(base, tmp_path):
    events = []
    with progress.shown_by(events.append):
        output = trained(base, tmp_path, max_steps=20)
    assert output.variant == "adapter"
    assert sorted(contents(output.folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((output.folder / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"], config["inference_mode"]) == (4, None, True)
    assert not any(str(tmp_path).encode() in raw for raw in contents(output.folder).values())
    assert {tensor.dtype for tensor in load_file(output.folder / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), output.folder)
    assert any(weight.abs().max() > 0 for name, weight in model.named_parameters() if "lora_B" in name)

    steps = [event.done for event in events if isinstance(event, progress.Step)]
    losses = [event.value for event in events if isinstance(event, progress.Metric) and event.name == "loss"]
    assert steps == list(range(1, 21))
    assert {event.total for event in events if isinstance(event, progress.Step)} == {20}
    assert losses[-1] < losses[0] - 0.3
    parameters = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name)
    assert any(f"trains {parameters:,} of" in event.text for event in events if isinstance(event, progress.Message))
    assert output.metrics["steps"] == 20
    assert output.metrics["trainable_parameters"] == parameters
    assert output.metrics["train_loss"] == pytest.approx(sum(losses) / len(losses))
    assert output.metrics["tokens"] == pytest.approx(20 * 2 * 32, rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_full_training_writes_the_bases_names_shapes_and_dtypes(tmp_path, tied):
    base = tiny_llama(tmp_path / "base", hidden=64, intermediate=96, tied=tied)
    output = trained(base, tmp_path / "work", method="full", max_steps=3)
    before, after = Checkpoint.open(base), Checkpoint.open(output.folder)
    assert output.variant == "tuned"
    assert after.tensors == before.tensors
    assert list(after.tensors) == list(before.tensors)
    for name in ("config.json", *before.companions):
        assert (output.folder / name).read_bytes() == (base / name).read_bytes()
    old, new = load_file(base / "model.safetensors"), load_file(output.folder / "model.safetensors")
    assert all(not torch.equal(old[name], new[name]) for name in old if "proj" in name or "embed" in name)
    _, found = AutoModelForCausalLM.from_pretrained(output.folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_dies_resumes_to_the_same_bytes(base, tmp_path, method):
    whole = trained(base, tmp_path / "whole", method=method)
    interrupted = tmp_path / "interrupted"
    with pytest.raises(Killed), progress.shown_by(dies_at(5)):
        trained(base, interrupted, method=method)
    events = []
    with progress.shown_by(events.append):
        resumed = trained(base, interrupted, method=method)
    assert [event.done for event in events if isinstance(event, progress.Step)] == [5, 6]
    assert "resumes from checkpoint-4" in [event.text for event in events if isinstance(event, progress.Message)]
    assert contents(resumed.folder) == contents(whole.folder)
    assert resumed.metrics["steps"] == whole.metrics["steps"]


CHILD = """
import sys
from pathlib import Path
from pipeline import progress
from tests.training.runs import trained

def say(event):
    if isinstance(event, progress.Step):
        print(event.done, "gptqmodel" in sys.modules, flush=True)
        if event.done == 5:
            sys.stdin.read()  # to be killed here

with progress.shown_by(say):
    trained(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_process_resumes_to_the_same_bytes_and_never_imports_gptqmodel(base, tmp_path):
    whole = trained(base, tmp_path / "whole")
    work = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(base), str(work)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        lines = []
        while len(lines) < 5 and (line := child.stdout.readline()):
            lines.append(line.split())
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert lines == [[str(step), "False"] for step in range(1, 6)]
    events = []
    with progress.shown_by(events.append):
        resumed = trained(base, work)
    assert [event.done for event in events if isinstance(event, progress.Step)] == [5, 6]
    assert contents(resumed.folder) == contents(whole.folder)


def test_the_same_seed_gives_the_same_bytes_wherever_the_base_lies(base, tmp_path):
    elsewhere = shutil.copytree(base, tmp_path / "elsewhere")
    first, second = trained(base, tmp_path / "a"), trained(elsewhere, tmp_path / "b")
    assert contents(first.folder) == contents(second.folder)
    third = trained(base, tmp_path / "c", seed=6)
    assert contents(third.folder) != contents(first.folder)


def test_conversations_and_completions_train_too(base, tmp_path):
    chatting = with_chat_template(shutil.copytree(base, tmp_path / "chatting"))
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    for name, row in (("chat", {"messages": turns}), ("pair", {"prompt": "2+2=", "completion": "4"})):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(f"{json.dumps(row)}\n" * 8)
        output = trained(chatting, tmp_path / name, data=Data(path=str(path)), max_steps=2)
        assert output.metrics["steps"] == 2


def test_a_loss_that_is_not_finite_ends_the_run(base, tmp_path):
    with pytest.raises(NonFinite, match=r"the loss is (nan|inf) at step|holds NaN or infinity"):
        trained(base, tmp_path, method="full", learning_rate=1e30, logging_steps=1)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"target_modules": ["nowhere"]}, "train.lora: .*nowhere.* not found"),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens.weight is tied"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "tied"),
        ({"target_modules": "all-linear", "r": 0}, "train.lora: .*r.*; correct the value"),
    ],
)
def test_an_adapter_that_cannot_be_made_or_merged_is_refused_before_training(tmp_path, lora, said):
    base = tiny_llama(tmp_path / "base", hidden=64, intermediate=96, tied=True)
    events = []
    with pytest.raises(RecipeError, match=said), progress.shown_by(events.append):
        trained(base, tmp_path / "work", lora=lora)
    assert events == []


def test_wrong_rows_and_bases_are_refused_before_training(base, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        trained(base, tmp_path / "a", data=Data(path=str(tmp_path / "none.jsonl")))
    packed = shutil.copytree(base, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}})
    )
    with pytest.raises(UnsupportedFormat, match=r"is quantized \(gptq\), training stands on dense weights"):
        trained(packed, tmp_path / "b", method="full")
    with pytest.raises(CheckpointError, match=r"missing or unexpected key, such as model\.layers\.0"):
        trained(packed, tmp_path / "d")
    wider = shutil.copytree(base, tmp_path / "wider")
    (wider / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing or unexpected key, such as model\.layers\.2"):
        trained(wider, tmp_path / "c", data=rows(tmp_path / "rows.jsonl"))


def test_what_a_kill_left_half_written_is_replaced(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.safetensors").write_bytes(b"half")
    output = trained(base, tmp_path, max_steps=1)
    assert "stale.safetensors" not in contents(output.folder)


def test_the_adapter_options_reach_peft_verbatim(base, tmp_path):
    lora = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}
    output = trained(base, tmp_path, lora=lora, max_steps=1)
    config = json.loads((output.folder / "adapter_config.json").read_text())
    assert {name: config[name] for name in lora} == lora
    assert LORA["r"] != lora["r"]
    assert ARGUMENTS["max_steps"] != output.metrics["steps"]
