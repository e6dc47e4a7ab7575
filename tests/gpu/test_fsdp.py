"""FSDP, which accelerate has only on GPUs: one process a device, the weights gathered for writing."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from pipeline.stages import train
from tests.checkpoints import tiny_llama
from tests.training.runs import contents, training_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_processes: {devices}
mixed_precision: 'no'
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: FULL_STATE_DICT
"""


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_sharded_model_trains_to_the_weights_of_one_that_is_not(tmp_path, method):
    base = tiny_llama(tmp_path / "base", dtype="float32")
    config = tmp_path / "accelerate.yaml"
    devices = torch.cuda.device_count()
    config.write_text(CONFIG.format(devices=devices))
    options = {"method": method, "lora": {"r": 4, "target_modules": "all-linear"}, "learning_rate": 1e-3, "bf16": False}
    [one] = train.run(training_job(base, tmp_path / "one", per_device_train_batch_size=2 * devices, **options))
    [sharded] = train.run(training_job(base, tmp_path / "many", launcher={"config": str(config)}, **options))
    assert contents(one.folder).keys() == contents(sharded.folder).keys()
    [first], [second] = (list(output.folder.glob("*.safetensors")) for output in (one, sharded))
    ours, theirs = load_file(first), load_file(second)
    for name, tensor in ours.items():
        assert torch.allclose(theirs[name], tensor, atol=1e-4), name
