"""The command line answers every mistake in one sentence, with the exit code that says whose it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flows import cli
from pipeline import by_hand
from pipeline.recipe import load_recipe, parse_recipe
from tests.checkpoints import tiny_llama

HEAVY = ("torch", "prefect", "transformers", "peft", "numpy", "bitsandbytes", "gptqmodel")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    tiny_llama(folder / "model")
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} row {i}"}) + "\n" for i in range(20))
        )
    (folder / "r.yaml").write_text(
        f"name: bot\nsource: {folder}/model\nquantize: [{{format: bitsandbytes}}]\n"
        f"evaluate: {{data: {folder}/eval.jsonl, sequence_length: 32}}\nstore: {folder}/store\n"
    )
    return folder


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "{root}/r.yaml"], ["plan", "{root}/r.yaml", "--json"], ["formats"]]
)
def test_help_and_plan_import_neither_torch_nor_prefect(root, arguments):
    script = (
        "import sys\nfrom flows import cli\n"
        f"code = cli.run({[argument.format(root=root) for argument in arguments]!r})\n"
        f"print('imported:', [name for name in {HEAVY!r} if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: [] 0"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "/nowhere.yaml"], 2, "No such file"),
        (["plan", "{root}/r.yaml", "--set", "seeed=1"], 2, "did you mean seed?"),
        (["plan", "{root}/r.yaml", "--set", "source=/nowhere/x"], 2, "/nowhere/x: no such folder"),
        (["nonsense"], 2, "nonsense"),
        (["plan"], 2, "requires an argument"),
        (["artifacts", "show", "bot/none", "--store", "{root}/empty"], 2, "holds no bot/none"),
        (["artifacts", "gc", "--keep", "0", "--store", "{root}/empty"], 2, "keep at least 1"),
        (["inspect", "/nowhere/x"], 2, "no such folder"),
        (["quantize", "{root}/model", "{root}/q", "--to", "gptq:bits=5"], 2, "bits"),
        (["quantize", "{root}/model", "{root}/q", "--to", "gptq"], 2, "--calibration"),
        (
            [
                "quantize",
                "{root}/model",
                "{root}/q",
                "--to",
                "gptq",
                "--calibration",
                "{root}/train.jsonl",
                "--calibration",
                "{root}/eval.jsonl",
                "--shares",
                "3",
            ],
            2,
            "shares has 1 for 2 sources of data",
        ),
        (["quantize", "{root}/model", "{root}/model/q", "--to", "nf4"], 2, "lies inside its input"),
        (["upcast", "{root}/model", "{root}/model"], 2, "exists and is not empty"),
        (["evaluate", "{root}/model", "--data", "{root}/none.jsonl"], 2, "none.jsonl"),
        (["train", "{root}/r.yaml"], 2, "train.method is none"),
        (["try", "{root}/model", "--prompt", "x", "--max-new-tokens", "0"], 2, "at least 1"),
    ],
)
def test_a_mistake_is_one_sentence_on_standard_error(root, capsys, arguments, code, said):
    assert cli.run([argument.format(root=root) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert said in " ".join(captured.err.split())
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not (root / "q").exists()
    assert not (root / "empty").exists()


def test_calibration_files_given_by_hand_are_mixed_by_their_shares(root, monkeypatch):
    seen = {}
    monkeypatch.setattr(by_hand, "run_by_hand", lambda *_, **given: seen.update(given) or [])
    files = ["--calibration", f"{root}/train.jsonl", "--calibration", f"{root}/eval.jsonl"]
    shares = ["--shares", "3", "--shares", "1", "--samples", "8"]
    model = ["quantize", f"{root}/model", f"{root}/q", "--to", "gptq:group_size=32"]
    assert cli.run([*model, *files, *shares]) == 0
    assert {role: Path(data.path).name for role, data in seen["data"].items()} == {
        "calibration_1": "train.jsonl", "calibration_2": "eval.jsonl",
    }  # fmt: skip
    assert seen["options"]["calibration"] == {"samples": [6, 2], "sequence_length": 512}
    assert cli.run([*model, *files[:2]]) == 0
    assert seen["options"]["calibration"] == {"samples": 128, "sequence_length": 512}


def test_debug_shows_the_traceback(capsys):
    assert cli.run(["run", "/nowhere.yaml", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_plan_prints_one_json_document(root, capsys):
    assert cli.run(["plan", f"{root}/r.yaml", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["plan"]
    assert [row["makes"] for row in rows] == ["dense", "nf4", "evaluation"]
    assert all(row["status"] == "run" and row["disk_bytes"] > 0 for row in rows)


def test_inspect_says_what_a_model_is(root, capsys):
    assert cli.run(["inspect", f"{root}/model", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert facts["parameters"] > 100_000


def test_init_writes_a_recipe_that_parses_and_fits_the_model(root, tmp_path, capsys):
    path = tmp_path / "bot.yaml"
    assert cli.run(["init", f"{root}/model", "--output", str(path)]) == 0
    recipe = load_recipe(path)
    assert recipe.source == f"{root}/model"
    assert {target.format for target in recipe.quantize} == {"bitsandbytes", "gptq", "awq"}
    assert cli.run(["init", f"{root}/model", "--output", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_doctor_names_what_is_there_and_what_is_missing(capsys, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert cli.run(["doctor", "--json"]) == 0
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert findings["torch"]["state"] == "ok"
    assert findings["Prefect server"]["state"] == "missing"
    assert "start it" in findings["Prefect server"]["remedy"]


def test_the_schema_is_the_recipe(capsys):
    assert cli.run(["schema"]) == 0
    assert "quantize" in json.loads(capsys.readouterr().out)["properties"]


def test_upcast_quantize_evaluate_and_try_work_without_a_recipe(root, tmp_path, capsys):
    assert cli.run(["quantize", f"{root}/model", str(tmp_path / "q"), "--to", "nf4", "--to", "int8"]) == 0
    assert sorted(path.name for path in tmp_path.joinpath("q").iterdir()) == ["int8", "nf4"]
    assert cli.run(["upcast", str(tmp_path / "q" / "nf4"), str(tmp_path / "dense")]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not list(tmp_path.glob(".*")), "work folders are removed"
    capsys.readouterr()
    arguments = ["evaluate", str(tmp_path / "q" / "nf4"), "--data", f"{root}/eval.jsonl", "--json"]
    assert cli.run([*arguments, "--reference", str(tmp_path / "dense"), "--sequence-length", "32"]) == 0
    score = json.loads(capsys.readouterr().out)["scores"][0]
    assert score["kl_divergence"] < 0.01, "NF4 beside its own dequantized weights"
    assert cli.run(["try", str(tmp_path / "dense"), "--prompt", "row", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("row")


def damaged(root: Path, folder: Path, damage: str) -> Path:
    """The model with one thing wrong, and a recipe for it."""
    shutil.copytree(root / "model", folder / "model")
    shard = folder / "model" / "model.safetensors"
    tensors = load_file(shard)
    match damage:
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "missing":
            save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, shard)
        case "unexpected":
            save_file({**tensors, "model.extra.weight": torch.ones(3)}, shard)
        case "escaping":
            index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
            (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
        case "pickle":
            shard.rename(folder / "model" / "pytorch_model.bin")
        case "nan":
            save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * torch.nan}, shard)
    recipe = folder / "r.yaml"
    recipe.write_text(f"name: bot\nsource: {folder}/model\nstore: {folder}/store\n")
    return recipe


@pytest.mark.parametrize(
    ("damage", "code", "said"),
    [
        ("truncated", 2, "model.safetensors: has"),
        ("missing", 2, "model.norm.weight: is in no shard"),
        ("unexpected", 2, "model.extra.weight"),
        ("escaping", 2, "leaves the folder"),
        ("pickle", 2, "a pickle, which is never opened"),
        ("nan", 1, "model.norm.weight: holds NaN"),
    ],
)
def test_a_damaged_model_is_one_sentence_and_no_version_is_written(root, tmp_path, capsys, damage, code, said):
    recipe = damaged(root, tmp_path, damage)
    (tmp_path / "rows.jsonl").write_text('{"text": "a row of text"}\n')
    overrides = ["--set", "train.method=full", "--set", f"train.data={tmp_path}/rows.jsonl"]
    assert cli.run(["train", str(recipe), *overrides]) == code
    said_all = capsys.readouterr().err
    assert said in said_all
    assert "Traceback" not in said_all
    assert not list((tmp_path / "store").glob("*/*/v*"))


@pytest.fixture(scope="module")
def ran(root) -> dict[str, object]:
    """`requant run` in a process of its own, with its --json document."""
    command = [sys.executable, "-m", "flows", "run", f"{root}/r.yaml", "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PREFECT_API_URL": ""}
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, object] = json.loads(done.stdout)
    return document


@pytest.mark.slow
def test_run_prints_one_json_document_and_the_store_holds_the_models(root, ran, capsys):
    assert ran["ran"] == ["dense", "nf4", "evaluation"]
    assert cli.run(["artifacts", "list", "--store", f"{root}/store", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["artifacts"]
    assert [row["reference"] for row in listed] == ["bot/dense@v0001", "bot/evaluation@v0001", "bot/nf4@v0001"]


@pytest.mark.slow
@pytest.mark.usefixtures("ran")
def test_the_store_is_shown_checked_promoted_and_cleaned_by_hand(root, capsys):
    store = ["--store", f"{root}/store"]
    assert cli.run(["artifacts", "promote", "bot/nf4@v0001", "staging", *store]) == 0
    assert cli.run(["artifacts", "verify", *store]) == 0
    assert cli.run(["artifacts", "lineage", "bot/nf4@staging", *store]) == 0
    out = capsys.readouterr().out
    assert "dense: bot/dense@v0001" in out
    assert f"source: {root}/model" in out
    assert cli.run(["artifacts", "rm", "bot/nf4@staging", *store]) == 2
    assert cli.run(["artifacts", "show", "bot/nf4@staging", *store]) == 0
    assert cli.run(["artifacts", "gc", "--keep", "1", *store]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("ran")
def test_a_second_run_runs_no_stage_and_says_so(root, capsys):
    assert cli.run(["run", f"{root}/r.yaml"]) == 0
    assert "ran no stage: everything was reused" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("ran")
def test_a_refused_gate_exits_3_shows_the_table_and_names_the_miss(root, capsys):
    overrides = ["--set", "evaluate.gates.kl_divergence=1e-9", "--set", "promote.alias=strict"]
    assert cli.run(["run", f"{root}/r.yaml", *overrides]) == 3
    captured = capsys.readouterr()
    assert "refused" in captured.out
    assert "kl_divergence" in captured.err
    assert "bound at most 1e-09" in captured.err


def test_the_nightly_deployment_runs_the_demo_recipe():
    deployments = yaml.safe_load(Path("prefect.yaml").read_text())["deployments"]
    demo = load_recipe(Path("examples/demo.yaml"))
    given = parse_recipe(yaml.safe_dump(deployments[0]["parameters"]["recipe"]), where="prefect.yaml")
    assert given == demo
