"""The rules of training on a quantized model, one test each; docs/training.md says where each lives."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments
from transformers.trainer_utils import validate_quantization_for_training

from pipeline import preflight_training, progress
from pipeline.checkpoint import Checkpoint
from pipeline.errors import RecipeError
from pipeline.inspection import inspect
from pipeline.jobs import Job
from pipeline.plan import make_plan
from pipeline.recipe import parse_recipe
from pipeline.sections import Data
from pipeline.stages import merge, train, upcast
from pipeline.trainability import ask
from pipeline.training.methods import METHODS
from pipeline.training.pooling import POOLINGS
from pipeline.training.projected import load_projected
from pipeline.training.task import Task
from tests.checkpoints import tiny_llama

ROOT = Path(__file__).parents[2]
LABELLED = {"method": "projector", "engine": "features", "projector": {"kind": "linear"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dense model, the same in NF4, and rows."""
    made = tmp_path_factory.mktemp("rules")
    tiny_llama(made / "dense", hidden=64, intermediate=96)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = AutoModelForCausalLM.from_pretrained(made / "dense", quantization_config=config, dtype="auto")
    packed.save_pretrained(made / "nf4")
    for path in (made / "dense").glob("tokenizer*"):
        (made / "nf4" / path.name).write_bytes(path.read_bytes())
    rows = {
        "text": [{"text": f"in the end there are {i} of them"} for i in range(60)],
        "labels": [{"text": f"row {i} is {'odd' if i % 2 else 'even'}", "label": i % 2} for i in range(60)],
    }
    for name, found in rows.items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return made


@pytest.fixture(autouse=True)
def _asked_here(monkeypatch):
    monkeypatch.setattr(preflight_training.child, "run", lambda _, *given, **__: ask(*given))


def plan(folder: Path, source: str, *overrides: str):
    text = f"schema: 1\nname: bot\nsource: {folder / source}\nstore: {folder / 'store'}\ntrain: {{method: none}}"
    return make_plan(parse_recipe(text, where="r.yaml", overrides=overrides))


def job(folder: Path, base: str, workspace: Path, rows: str, **options) -> Job:
    arguments = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 8}
    common = {
        "sequence_length": 32,
        "arguments": arguments,
        "seed": 1,
        "lora": {"r": 4, "target_modules": "all-linear"},
    }
    workspace.mkdir(parents=True, exist_ok=True)
    return Job(
        inputs={"base": folder / base}, options={**common, **options}, workspace=workspace,
        data={"train": Data(path=str(folder / f"{rows}.jsonl"))},
    )  # fmt: skip


def ready(folder: Path, base: str, method: str, **options):
    """What a method makes of a base, before Trainer sees it."""
    task = Task(kind="text") if method in {"lora", "full"} else Task(kind="classification", classes=("0", "1"))
    given = {"seed": 1, "lora": {"r": 4, "target_modules": "all-linear"}, "projector": {"kind": "linear"}, **options}
    return METHODS[method].ready(
        Checkpoint.open(folder / base), task, given, device="cpu", trust_remote_code=False
    )  # fmt: skip


def test_rule_dequantize_fine_tune_quantize_is_what_a_recipe_does_unless_it_says_otherwise(folder):
    steps = plan(
        folder, "nf4", f"train={{method: full, data: {folder}/text.jsonl}}", "quantize=[{format: bitsandbytes}]"
    )
    assert [step.name for step in steps.steps] == ["upcast", "train", "quantize"]


def test_rule_1_quantized_base_models_require_adapters(folder):
    with pytest.raises(RecipeError, match="trains the weights themselves"):
        plan(folder, "nf4", f"train={{method: full, base: source, data: {folder}/text.jsonl}}")
    adapted = ready(folder, "nf4", "lora").model
    assert isinstance(adapted, PeftModel)
    validate_quantization_for_training(adapted)


def test_rule_2_not_every_method_of_quantization_trains_so_the_installed_one_is_asked(folder):
    said = {name: inspect(Checkpoint.open(folder / name)).trainable for name in ("dense", "nf4")}
    assert said == {"dense": "every weight, or adapters", "nf4": "adapters on top, or after an upcast"}


def test_rule_3_a_quantized_model_is_never_compiled(folder):
    data = f"data: {folder}/text.jsonl"
    with pytest.raises(RecipeError, match="torch_compile does not work on a quantized base"):
        plan(folder, "nf4", f"train={{method: lora, base: source, {data}, arguments: {{torch_compile: true}}}}")


def test_rule_value_peft_is_0_18_or_newer(folder, monkeypatch):
    monkeypatch.setattr("pipeline.trainability.peft_version", lambda: (0, 17))
    with pytest.raises(RecipeError, match=r"needs peft 0\.18 or newer"):
        plan(folder, "dense", f"train={{method: lora, data: {folder}/text.jsonl}}")


def test_rule_trainer_refuses_a_quantized_backbone_even_where_a_projector_alone_trains(folder):
    model = ready(folder, "nf4", "projector").model
    assert not any(weight.requires_grad for weight in model.backbone.parameters())
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    with pytest.raises(RecipeError, match="use engine features, or base dense"):
        plan(folder, "nf4", f"train={{method: projector, engine: trainer, base: source, data: {folder}/labels.jsonl}}")


@pytest.mark.parametrize(("base", "method"), [("dense", "full"), ("dense", "lora"), ("nf4", "lora"),
                                              ("dense", "head"), ("dense", "projector")])  # fmt: skip
def test_rule_every_model_that_reaches_trainer_passes_its_guard_untouched(folder, base, method):
    made = ready(folder, base, method)
    inner = made.model.base_model.model if method == "lora" else made.loaded.model
    assert bool(getattr(inner, "is_quantized", False)) == (base == "nf4")  # it says what it is
    assert not getattr(inner, "_hf_peft_config_loaded", False)
    validate_quantization_for_training(made.model)


def test_rule_no_workaround_is_used_anywhere():
    """Flags are never flipped: what is assigned is looked for, not what a docstring speaks of."""
    flags = {"_hf_peft_config_loaded", "is_quantized"}
    for path in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("flows/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = {target.attr for target in targets if isinstance(target, ast.Attribute)}
            if names & flags:  # the one that tells the truth: a projected model says what its backbone is
                assert path.name == "projector.py"
                assert "bool(getattr(model, 'is_quantized', False))" in ast.unparse(node.value)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"setattr", "delattr"}:
                assert not any(isinstance(each, ast.Constant) and each.value in flags for each in node.args), path


def test_solution_1_a_frozen_dense_backbone_gives_gradients_to_the_projector_alone(folder):
    made = ready(folder, "dense", "projector")
    ids = torch.randint(3, 250, (4, 8))
    made.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    reached = {name for name, weight in made.model.named_parameters() if weight.grad is not None}
    assert reached == made.trainable
    assert all(name.startswith("projector.") for name in reached)


def test_solution_1_the_feature_is_the_last_real_token_whichever_side_is_padded():
    hidden = torch.arange(2 * 4 * 1.0).reshape(2, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    assert POOLINGS["last_token"](hidden, mask).flatten().tolist() == [1.0, 7.0]


def test_solution_2_a_quantized_backbone_is_run_frozen_without_gradients_and_never_changes(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in (folder / "nf4").iterdir()}
    [output] = train.run(job(folder, "nf4", tmp_path / "train", "labels", **LABELLED))
    assert (output.variant, output.metrics["trainable_parameters"]) == ("projector", 2 * 64 + 2)
    assert {path.name: path.read_bytes() for path in (folder / "nf4").iterdir()} == before
    given = Job(inputs={"base": folder / "nf4", "projector": output.folder}, options={}, workspace=tmp_path / "merge")
    [pair] = merge.run(given)
    model = load_projected(pair.folder)
    assert model.is_quantized
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 2)


def test_solution_2_brings_what_trainer_would_have_logging_evaluation_and_checkpoints(folder, tmp_path):
    seen: list[progress.Event] = []
    arguments = {"max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "save_steps": 2}
    given = job(folder, "nf4", tmp_path, "labels", **{**LABELLED, "arguments": arguments})
    rows = Data(path=str(folder / "labels.jsonl"), validation=0.3)
    validation = rows.model_copy(update={"part": "validation"})
    given = Job(
        inputs=given.inputs, options=given.options, workspace=tmp_path, data={"train": rows, "validation": validation}
    )
    with progress.shown_by(seen.append):
        [output] = train.run(given)
    figures = {event.name for event in seen if isinstance(event, progress.Metric)}
    assert {"loss", "learning_rate", "rows_per_second", "validation_loss", "validation_accuracy"} <= figures
    assert output.metrics["validation_loss"] > 0
    assert list((tmp_path / "checkpoints").glob("checkpoint-*"))


def test_reason_the_adapter_is_a_differentiable_path_through_frozen_quantized_weights(folder, tmp_path):
    """Its gradients on packed weights are those on the dequantized ones."""
    [dense] = upcast.run(Job(inputs={"source": folder / "nf4"}, options={"dtype": "float32"}, workspace=tmp_path))
    ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for base in (folder / "nf4", dense.folder):
        model = ready(base.parent, base.name, "lora", lora={"r": 4, "target_modules": ["q_proj", "down_proj"]}).model
        for number, (name, weight) in enumerate(model.named_parameters()):
            if ".lora_" in name:
                torch.nn.init.normal_(weight, std=0.02, generator=torch.Generator().manual_seed(number))
        model(input_ids=ids, labels=ids).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    packed, plain = found
    assert packed.keys() == plain.keys()
    assert all((packed[name] - plain[name]).norm() < 0.02 * plain[name].norm() for name in plain)


def test_reason_little_trains_and_it_is_said_how_much(folder, tmp_path):
    seen: list[progress.Event] = []
    with progress.shown_by(seen.append):
        list(train.run(job(folder, "nf4", tmp_path, "text", method="lora")))
    said = next(event.text for event in seen if isinstance(event, progress.Message) and "trains" in event.text)
    adapter = sum(4 * (rows + columns) for rows, columns in [(64, 64), (64, 32), (64, 32), (64, 64)] + [(64, 96)] * 3)
    assert f"trains {2 * adapter:,} of " in said


def test_make_sure_only_what_the_method_names_requires_a_gradient(folder, tmp_path, monkeypatch):
    """Were something else left trainable, the run would stop before its first step."""
    from pipeline.errors import CheckFailed
    from pipeline.training import full

    monkeypatch.setattr(full, "freeze_but", lambda model, *_, **__: frozenset({"lm_head.weight"}))
    with pytest.raises(CheckFailed, match="which is not what method full says"):
        list(train.run(job(folder, "dense", tmp_path, "text", method="full")))


def test_make_sure_the_loss_is_looked_at_and_fell(folder, tmp_path):
    from pipeline.errors import CheckFailed

    arguments = {"max_steps": 2, "learning_rate": 0.0, "per_device_train_batch_size": 8}
    with pytest.raises(CheckFailed, match="the loss of the sampled training sequences did not fall"):
        list(train.run(job(folder, "dense", tmp_path, "text", method="lora", arguments=arguments)))


def test_the_page_names_every_test_of_this_file_that_is_a_rule():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    own = [
        name for name in globals() if name.startswith(("test_rule_", "test_solution_", "test_reason_", "test_make_"))
    ]
    assert [name for name in own if f"`{name}`" not in page] == []


def test_the_guard_itself_is_still_there(folder):
    """If transformers drops it, these rules want reading again."""
    import inspect as source

    from transformers import Trainer

    assert "validate_quantization_for_training" in source.getsource(Trainer.__init__)
    assert TrainingArguments
