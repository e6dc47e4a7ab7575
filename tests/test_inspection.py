"""What is told of a checkpoint is told of any that opens."""

import json

import pytest

from pipeline.checkpoint import Checkpoint
from pipeline.inspection import inspect
from tests.checkpoints import tiny_llama


@pytest.mark.parametrize("named", [7, {"model": 1}, [], [None], "x"])
def test_architectures_of_another_kind_are_no_obstacle(tmp_path, named):
    config = json.loads((tiny_llama(tmp_path, layers=1) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": named}))
    assert inspect(Checkpoint.open(tmp_path)).architecture in {"llama", "None"}
