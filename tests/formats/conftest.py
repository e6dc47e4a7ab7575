"""What gptqmodel writes, made once for every test that compares with it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import tiny_llama

PROGRAM = "tests.formats.written_by_gptqmodel"


@pytest.fixture(scope="session")
def gptqmodel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of cases and checkpoints that gptqmodel wrote; see the program."""
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("gptqmodel is not installed, so there is nothing to compare with")
    folder = tmp_path_factory.mktemp("gptqmodel")
    dense = tiny_llama(folder / "dense", layers=1)
    settings = {
        "GPTQMODEL_CPU_WORKERS": "2",  # it asks for more workers than two cores have
        "GPTQMODEL_DISABLE_PACK_EXT": "1",  # its Python packer: the C++ one takes a minute to compile
        "TORCHDYNAMO_DISABLE": "1",  # it compiles the kernel of a module that it reloads
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-m", PROGRAM, str(folder), str(dense)],
        env=os.environ | settings, cwd=folder, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
