"""What a recipe's launcher and its accelerate config come to, known before anything is started."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.errors import RecipeError
from pipeline.launcher import Launch, read_launch
from pipeline.sections import Launcher


def config(tmp_path, text):
    path = tmp_path / "accelerate.yaml"
    path.write_text(text)
    return str(path)


def test_processes_alone_need_no_config():
    assert read_launch(Launcher(processes=3)) == Launch(processes=3)


def test_a_configs_processes_count_where_the_recipe_names_none(tmp_path):
    path = config(tmp_path, "distributed_type: FSDP\nnum_processes: 4\nmixed_precision: 'no'\n")
    found = read_launch(Launcher(config=path))
    assert (found.processes, found.fsdp, str(found.config)) == (4, True, path)
    assert read_launch(Launcher(config=path, processes=4)).processes == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distributed_type: DEEPSPEED", "has distributed_type DEEPSPEED; choose from FSDP, MULTI_CPU, MULTI_GPU, NO"),
        ("compute_environment: AMAZON_SAGEMAKER", "is for AMAZON_SAGEMAKER; write one for LOCAL_MACHINE"),
        ("num_machines: 2", "has num_machines 2, but the store is a folder of one machine"),
        ("mixed_precision: bf16", "has mixed_precision bf16; set train.arguments.bf16: true instead"),
        ("dynamo_config: {dynamo_backend: INDUCTOR}", "has dynamo_config: compiling is train.arguments' business"),
        ("parallelism_config: {tp_size: 2}", "has parallelism_config: the processes share rows"),
        ("num_processes: many", "has num_processes many, expected a whole number"),
        ("num_processes: 4", "has num_processes 4, but train.launcher.processes is 2; give one of them"),
        ("- a list", "holds no keys; run accelerate config"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_config_that_cannot_be_launched_is_refused_in_one_sentence(tmp_path, text, said):
    with pytest.raises(RecipeError, match=said) as caught:
        read_launch(Launcher(config=config(tmp_path, text), processes=2))
    assert "\n" not in str(caught.value)


def test_a_config_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"train\.launcher\.config: .*none\.yaml: No such file"):
        read_launch(Launcher(config=str(tmp_path / "none.yaml")))


def test_reading_it_imports_neither_accelerate_nor_torch():
    code = "import sys, pipeline.launcher; print({'torch', 'accelerate'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
