"""Activations on the grid that a packed model's kernels put them on."""

import pytest
import torch

from pipeline.evaluation.rounding import rounded, rounding

VALUES = torch.tensor([[1.0, 0.24, -4.0], [100.0, 3.0, 0.0]])


@pytest.mark.parametrize(
    ("activations", "expected"),
    [
        ("", [[1.0, 0.24, -4.0], [100.0, 3.0, 0.0]]),
        ("int8", [[32 * 4 / 127, 8 * 4 / 127, -4.0], [100.0, 4 * 100 / 127, 0.0]]),
        ("int8 by tensor", [[100 / 127, 0.0, -5 * 100 / 127], [100.0, 4 * 100 / 127, 0.0]]),
        ("int8 even", [[32 * 8 / 255, 8 * 8 / 255, -127 * 8 / 255], [127 * 200 / 255, 4 * 200 / 255, 0.0]]),
        ("int4", [[2 * 4 / 7, 0.0, -4.0], [100.0, 0.0, 0.0]]),
        ("float8", [[1.0, 26 / 112, -4.0], [100.0, 13 / 4.48, 0.0]]),
    ],
)
def test_each_grid_ends_at_the_largest_value_of_a_token_or_of_all(activations, expected):
    torch.testing.assert_close(rounded(VALUES, activations), torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_only_the_named_modules_round_and_only_inside_the_block():
    first, second = (torch.nn.Linear(3, 3, bias=False) for _ in range(2))
    with torch.no_grad():
        with rounding([first], "int8"):
            assert torch.equal(first(VALUES), rounded(VALUES, "int8") @ first.weight.T)
            assert torch.equal(second(VALUES), VALUES @ second.weight.T)
        assert torch.equal(first(VALUES), VALUES @ first.weight.T)
