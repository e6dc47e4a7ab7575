"""What is said of a checkpoint before anything is written is what transformers says when it loads it."""

import random
import re

import pytest
import torch
import transformers

from pipeline.catalog import DENSE
from pipeline.checkpoint import Checkpoint
from pipeline.upcasting.layout import laid_out
from tests.architectures import ARCHITECTURES
from tests.packed_models import saved, store, stored

DAMAGES = 2  # of each architecture; 1,400 others were tried once


def remove(tensors, name, _):
    del tensors[name]


def rename(tensors, name, _):
    tensors[f"{name}x"] = tensors.pop(name)


def double(tensors, name, _):
    tensors[name] = torch.cat([tensors[name]] * 2) if tensors[name].ndim else tensors[name][None]


def halve(tensors, name, _):
    tensors[name] = tensors[name][: len(tensors[name]) // 2] if tensors[name].ndim else tensors[name]


def turn(tensors, name, _):
    tensors[name] = tensors[name].mT if tensors[name].ndim > 1 else tensors[name]


def wrap(tensors, name, _):
    tensors[name] = tensors[name][None]


def exchange(tensors, name, choose):
    other = choose(sorted(tensors))
    tensors[name], tensors[other] = tensors[other], tensors[name]


def add(tensors, name, _):
    tensors[f"extra.{name}"] = tensors[name]


def move(tensors, name, choose):
    """To another layer or expert, which may have one of that name already."""
    number = re.search(r"\.(\d+)\.", name)
    if number:
        tensors[f"{name[: number.start(1)]}{choose([0, 1, 4, 9])}{name[number.end(1) :]}"] = tensors.pop(name)


def prefix(tensors, name, choose):
    head = choose(["model.", "transformer.", "bert.", "language_model.", "base_model."])
    tensors[name.removeprefix(head) if name.startswith(head) else head + name] = tensors.pop(name)


KINDS = [remove, rename, double, halve, turn, wrap, exchange, add, move, prefix]


def refusal(folder, name):
    """What transformers reports or raises."""
    try:
        _, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # noqa: BLE001 - whatever it raises is a refusal
        return {"raised": error}
    return {key: value for key, value in report.items() if value}


def problems(folder):
    checkpoint = Checkpoint.open(folder)
    with laid_out(checkpoint, DENSE, dtype=torch.float32, trust_remote_code=False) as layout:
        return layout.problems


@pytest.fixture(autouse=True)
def quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(100)  # its reports of what does not fit are many
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_damaged_checkpoint_is_refused_exactly_when_transformers_would_not_load_it_whole(name, tmp_path):
    saved(ARCHITECTURES[name], tmp_path)
    whole = stored(tmp_path)
    draw = random.Random(name)  # the same every time
    for _ in range(DAMAGES):
        kind, tensor = draw.choice(KINDS), draw.choice(sorted(whole))
        tensors = dict(whole)
        kind(tensors, tensor, draw.choice)
        store(tmp_path, tensors)
        said, found = refusal(tmp_path, ARCHITECTURES[name].model), problems(tmp_path)
        assert bool(found) == bool(said), (kind.__name__, tensor, said, found)
        assert all("\n" not in str(problem) for problem in found)
