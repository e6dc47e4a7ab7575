"""What fails in every library: an adapter trained on a quantized base, merged, saved, requantized, reloaded, better."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline import outcome
from pipeline.checkpoint import Checkpoint
from pipeline.execute import run_step
from pipeline.gates import read_report
from pipeline.jobs import Job
from pipeline.plan import Plan, make_plan
from pipeline.recipe import parse_recipe
from pipeline.sections import Data
from pipeline.stages import quantize
from pipeline.targets import parse_target
from tests.checkpoints import tiny_llama

TARGETS = {"nf4": "nf4", "int8": "int8", "gptq": "gptq:group_size=32", "awq": "awq:group_size=32"}
RECIPE = """
schema: 1
name: bot
source: {source}
train:
  method: lora
  base: source
  data: {{path: {root}/text.jsonl, held_out: 0.2, validation: 0.1}}
  sequence_length: 64
  lora: {{r: 8, target_modules: all-linear}}
  arguments: {{learning_rate: 1.0e-2, max_steps: 12, per_device_train_batch_size: 8}}
quantize: [{target}]
calibration: {{samples: 8, sequence_length: 64}}
evaluate: {{data: held_out, sequence_length: 64, gates: {{tuned: {{perplexity_increase: -0.2}}}}}}
store: {root}/store
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tiny_llama(folder / "dense")
    lines = [
        json.dumps({"text": f"in the end there are {i} of them, and {i + 1} in the other one"}) for i in range(200)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def sources(root) -> dict[str, Path]:
    """The dense model in each format, by the libraries that own them."""
    targets = [parse_target(text).model_dump() for text in TARGETS.values()]
    options = {"targets": targets, "calibration": {"samples": 8, "sequence_length": 64}, "seed": 0}
    job = Job(
        inputs={"dense": root / "dense"}, options=options, workspace=root / "work",
        data={"calibration": Data(path=str(root / "text.jsonl"))},
    )  # fmt: skip
    return dict(zip(TARGETS, (output.folder for output in quantize.run(job)), strict=True))


def ran(root: Path, source: Path, target: str, *overrides: str) -> Plan:
    written = json.dumps(parse_target(target).model_dump(exclude_none=True))
    text = RECIPE.format(root=root, source=source, target=written)
    plan = make_plan(parse_recipe(text, where="r.yaml", overrides=overrides))
    for step in plan.steps:
        # Loading GPTQ and AWQ changes transformers for the whole process.
        run_step(plan, step, isolated=step.stage == "train")
    return plan


@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_trained_on_each_format_is_requantized_to_it_and_better_than_the_untrained_model(
    root, sources, name
):
    plan = ran(root, sources[name], TARGETS[name], f"name={name}")
    rows = {row.variant: row for row in outcome.rows(plan)}
    variant = parse_target(TARGETS[name]).variant
    report = read_report(outcome.made(plan)["evaluation"].path)
    assert report[variant].perplexity < 0.9 * report["dense"].perplexity
    assert rows["tuned"].gate == "passed"
    # in the format that it came in, and reloaded to be judged
    method = Checkpoint.open(sources[name]).quantization.method
    assert Checkpoint.open(rows[variant].artifact.path).quantization.method == method


@pytest.mark.parametrize("base", ["nf4"])
def test_the_better_of_both_bases_is_chosen_on_training_rows_set_aside(root, base):
    plan = ran(root, root / "dense", "nf4", f"name=better-{base}", f"train.base={base}", "train.merge_base=better")
    made = outcome.made(plan)
    metrics, notes = made["tuned"].manifest.metrics, made["tuned"].manifest.notes
    losses = {name: metrics[f"validation_loss_{name}"] for name in ("dequantized", "original")}
    assert notes["merge_base"] == min(losses, key=losses.get)
    assert losses["dequantized"] != losses["original"]
    assert all(torch.isfinite(torch.tensor(loss)) for loss in losses.values())
