"""A change that no code of the source's grid shows is rounded away, and said to be."""

import pytest
import torch

from pipeline.formats.rounded import Rounded
from pipeline.quantization import survival as module
from pipeline.quantization.grids import nearest
from pipeline.quantization.survival import Survival, rounded_away, sentence, survival


def eight():
    """Eight weights of one output on a grid with step 0.5 and zero point 8."""
    codes = torch.tensor([[0, 1, 7, 8, 9, 15, 8, 3]], dtype=torch.uint8)
    return Rounded(
        bits=4, codes=codes, scales=torch.full((1, 1), 0.5).half(), zeros=torch.full((1, 1), 8, dtype=torch.uint8),
        groups=torch.zeros(8, dtype=torch.int32),
    )  # fmt: skip


def test_eight_values_by_hand():
    """Two of eight weights pass the middle to the next code; all moved by half a step or a fifth of one."""
    moved = torch.tensor([[0.3, 0.1, 0.1, 0.1, 0.3, 0.1, 0.1, 0.1]])
    found = survival(eight().dense() + moved, eight(), torch.float32)
    assert found.changed_codes == 2 / 8
    assert found.change_in_steps == pytest.approx(((2 * 0.09 + 6 * 0.01) / 8) ** 0.5 / 0.5)
    assert not found.rounded_away


def test_a_change_of_less_than_half_a_step_is_rounded_away():
    found = survival(eight().dense() + 0.2, eight(), torch.float32)
    assert (found.changed_codes, found.rounded_away) == (0.0, True)


def test_a_weight_that_did_not_change_is_not_rounded_away():
    found = survival(eight().dense(), eight(), torch.float32)
    assert found == Survival(changed_codes=0.0, change_in_steps=0.0)
    assert not found.rounded_away


def test_what_bfloat16_lost_of_eight_bits_is_no_change(monkeypatch):
    monkeypatch.setattr(module, "WEIGHTS_AT_ONCE", 100)  # the last rows are fewer
    weight = torch.rand(7, 64, generator=torch.Generator().manual_seed(0))
    source = nearest(weight, bits=8, group_size=32, symmetric=False)
    dense = source.dense().bfloat16().float()
    assert not torch.equal(dense, source.dense())
    assert survival(dense, source, torch.bfloat16) == Survival(changed_codes=0.0, change_in_steps=0.0)
    one = dense.clone()
    one[6, 63] += 1
    assert survival(one, source, torch.bfloat16).changed_codes == 1 / (7 * 64)


def test_scales_of_zero_leave_a_change_that_is_a_whole_one():
    zero = Rounded(
        bits=4, codes=torch.zeros(1, 8, dtype=torch.uint8), scales=torch.zeros(1, 1).half(),
        zeros=torch.zeros(1, 1, dtype=torch.uint8), groups=torch.zeros(8, dtype=torch.int32),
    )  # fmt: skip
    assert survival(torch.zeros(1, 8), zero, torch.float32) == Survival(changed_codes=0.0, change_in_steps=0.0)
    assert survival(torch.ones(1, 8), zero, torch.float32) == Survival(changed_codes=1.0, change_in_steps=1.0)


def test_three_of_the_modules_are_named_with_what_helps():
    little, much = (Survival(changed_codes=share, change_in_steps=0.01) for share in (0.0009, 0.001))
    found = dict.fromkeys("dcba", little) | {"e": much}
    assert rounded_away(found) == ("a", "b", "c", "d")
    said = sentence("gptq-4bit", found, grid="fresh")
    assert "the training of 4 of 5 changed modules, fewer than 0.1% of whose codes change (a, b, c, …)" in said
    assert "use more bits, grid: better, a higher learning rate" in said
    assert "grid: better" not in sentence("gptq-4bit", found, grid="better")
    assert sentence("gptq-4bit", {"e": much}, grid="fresh") is None
