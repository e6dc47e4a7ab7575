"""The benchmark of quantization compares token by token, and runs at a tiny size."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.quality import Judged, answers, interval, judge

ROOT = Path(__file__).parents[1]


def judged(losses: torch.Tensor) -> Judged:
    return Judged(losses=losses, divergences=torch.zeros_like(losses), agreeing=torch.ones_like(losses))


def predicting(logits: torch.Tensor):
    """A model that says the same of every position."""
    return lambda ids: SimpleNamespace(logits=logits.expand(*ids.shape, -1))


def test_losses_divergence_and_agreement_are_those_of_two_tokens_by_hand():
    dense, other = predicting(torch.tensor([0.0, 0.0])), predicting(torch.tensor([0.0, math.log(3.0)]))
    windows = torch.tensor([[0, 1, 0]])
    found = judge(answers(dense, windows), other, windows)
    assert found.losses.flatten().tolist() == pytest.approx([math.log(4 / 3), math.log(4)])
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert found.divergences.flatten().tolist() == pytest.approx([divergence] * 2)
    assert found.agreeing.flatten().tolist() == [0, 0]  # the dense model's first likeliest is the other's second


def test_many_windows_are_judged_in_the_order_in_which_they_came():
    random = torch.Generator().manual_seed(0)
    windows = torch.randint(0, 7, (19, 5), generator=random)
    logits = torch.randn(7, generator=random)
    found = judge(answers(predicting(logits), windows), predicting(logits), windows)
    assert found.losses.equal(-torch.log_softmax(logits, 0)[windows[:, 1:]])
    assert not found.divergences.any()
    assert found.agreeing.all()


def test_what_was_judged_comes_back_from_its_file(tmp_path):
    one = judged(torch.rand(3, 4))
    one.save(tmp_path / "judged.safetensors")
    assert Judged.load(tmp_path / "judged.safetensors").losses.equal(one.losses)


def test_the_same_losses_differ_by_nothing():
    one = judged(torch.rand(20, 8))
    assert interval([one], [one]) == (0, 0, 0)


def test_a_difference_of_every_token_is_certain_however_much_the_tokens_differ_from_each_other():
    theirs = judged(10 * torch.rand(20, 8))
    ours = judged(theirs.losses + 0.5)
    assert interval([ours], [theirs]) == pytest.approx((0.5, 0.5, 0.5), abs=1e-5)


def test_the_interval_is_as_wide_as_the_spread_of_windows_says():
    random = torch.Generator().manual_seed(1)
    ours = judged(torch.randn(400, 1, generator=random).expand(400, 8))  # tokens of one window say the same thing
    mean, low, high = interval([ours], [judged(torch.zeros(400, 8))])
    error = float(ours.losses[:, 0].std()) / math.sqrt(400)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert low < mean < high


def test_several_draws_are_averaged_window_by_window():
    zeros = judged(torch.zeros(30, 4))
    up, down = (judged(sign * torch.arange(30.0)[:, None].expand(30, 4)) for sign in (1, -1))
    assert interval([up, down], [zeros, zeros]) == (0, 0, 0)


@pytest.mark.slow
def test_the_script_runs_and_finds_bitsandbytes_own_losses_in_requants_nf4(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "quantize.py", "--smoke", "--draws", "2", "--folder", tmp_path]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True
    )
    assert "failed" not in done.stdout
    rows = [line for line in done.stdout.splitlines() if "Requant: NF4" in line]
    assert "+0.0000 (+0.0000 to +0.0000)" in rows[1]
    assert not list(tmp_path.iterdir())
