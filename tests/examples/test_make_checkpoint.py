"""make_checkpoint.py goes from the standard library's source to an AWQ folder, and the folder shipped is such a one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import child
from pipeline.catalog import FORMATS
from pipeline.checkpoint import Checkpoint
from pipeline.encoding import load_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
SHIPPED = EXAMPLES / "stdlib-lm-awq"
TOY = {
    "steps": 2, "batch": 2, "files": 30, "vocabulary": 300, "hidden": 128, "intermediate": 128, "layers": 2,
    "samples": 4, "length": 32, "group-size": 32,
}  # fmt: skip


@pytest.mark.slow
def test_a_toy_model_is_trained_and_written_from_nothing(tmp_path):
    options = [word for name, value in TOY.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "make_checkpoint.py", "--out", tmp_path / "out", *options],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "step 2 of 2" in done.stdout
    assert "14 modules in AWQ" in done.stdout
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.quantization.method == "awq"
    tokenizer = load_tokenizer(tmp_path / "out", trust_remote_code=False)
    assert tokenizer.decode(tokenizer.encode("def f(x):\n    return x\n")) == "def f(x):\n    return x\n"
    report = child.run("tests.quantization.reloading:logits", tmp_path / "out", "bfloat16")["report"]
    assert not any(report.values()), report


def test_the_shipped_folder_is_small_and_says_nothing_of_the_machine_that_made_it():
    checkpoint = Checkpoint.open(SHIPPED)
    files = list(SHIPPED.iterdir())
    assert {path.name for path in files} == set(checkpoint.files)
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert len(FORMATS["awq"].packed_modules(checkpoint.tensors)) == 6 * 7
    quantization = checkpoint.quantization
    assert (quantization.method, quantization.bits, quantization.group_size) == ("awq", 4, 64)
    assert list(quantization.raw["meta"]) == ["quantizer"]
    assert "_name_or_path" not in checkpoint.config
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert '"/' not in (SHIPPED / name).read_text(), f"{name} holds an absolute path"


@pytest.mark.slow
def test_the_shipped_folder_loads_whole():
    found = child.run("tests.quantization.reloading:logits", SHIPPED, "bfloat16")
    assert not any(found["report"].values()), found["report"]
    assert found["modules"]["lm_head"] == "Linear"
