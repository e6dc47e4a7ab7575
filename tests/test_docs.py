"""Every command in the documentation is one that runs: here, in make's own targets, or in the deployment test."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows import cli, reference

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
# Run by tests/integration/test_deployment.py against a server of its own.
DEPLOYMENT = {
    "prefect server start", "prefect work-pool create requant --type process", "prefect worker start --pool requant",
    "prefect --no-prompt deploy --all", "prefect deployment run train-and-quantize/train-and-quantize",
}  # fmt: skip


def commands() -> list[str]:
    """Every line of every ```sh block, in the order of the pages, each once."""
    lines = [
        line.strip()
        for page in PAGES
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return list(dict.fromkeys(line.partition("  #")[0].strip() for line in lines))


@pytest.fixture(scope="module")
def folder_of_the_pages(tmp_path_factory) -> Path:
    """A folder like the repository's, with the example model and the demo recipe cut down to seconds."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "examples", folder / "examples")
    rows = [f'{{"text": "The for statement iterates over item {i}. {"It repeats. " * 20}"}}\n' for i in range(30)]
    (folder / "examples" / "data").mkdir(exist_ok=True)
    for name in ("train", "eval"):
        (folder / "examples" / "data" / f"{name}.jsonl").write_text("".join(rows))
    recipe = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text())
    recipe["train"] |= {"sequence_length": 64, "arguments": {"max_steps": 2, "per_device_train_batch_size": 2}}
    recipe["quantize"] = [target for target in recipe["quantize"] if target["format"] == "bitsandbytes"]
    recipe["evaluate"]["gates"] = {}
    (folder / "examples" / "demo.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


@pytest.mark.slow
def test_every_requant_command_of_the_documentation_runs_in_the_order_of_the_pages(
    folder_of_the_pages, monkeypatch, capsys
):
    monkeypatch.chdir(folder_of_the_pages)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    found = [line for line in commands() if line.startswith("requant ")]
    assert "requant run examples/demo.yaml" in found
    # What a page shows of a store comes after some run on another page.
    for line in sorted(found, key=lambda line: line != "requant run examples/demo.yaml"):
        assert cli.run(shlex.split(line)[1:]) == 0, f"{line}\n{capsys.readouterr().err}"


def test_every_other_command_is_a_target_of_make_or_run_by_the_deployment_test():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    deployment = (ROOT / "tests" / "integration" / "test_deployment.py").read_text()
    for line in (line for line in commands() if not line.startswith("requant ")):
        words = shlex.split(line)
        if words[0] == "make":
            assert set(words[1:]) <= targets, line
        elif words[0] == "git":
            assert words[1] == "clone", line
        elif words[0] == "cd":
            continue
        else:
            assert line in DEPLOYMENT, line
            assert all(f'"{word}"' in deployment for word in words[1:] if "/" not in word), line


def test_the_recipes_page_is_written_from_the_models():
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == reference.reference()


def test_every_link_between_pages_leads_somewhere():
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "artifacts" / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_shows_every_format_of_the_catalog():
    from pipeline.catalog import FORMATS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in FORMATS.values():
        assert f"| {row.title} |" in readme, row.title


def test_the_command_line_is_installed_under_its_name():
    done = subprocess.run(
        [Path(sys.executable).parent / "requant", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0.1.0"
