"""A feature is made of real tokens alone, wherever the padding lies."""

from __future__ import annotations

import pytest
import torch

from pipeline.training.pooling import POOLINGS, cls, last_token, mean

# Token t of a row holds (t, 10 t); padding holds NaN, which shows wherever it is touched.
ROW = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
PADDING = torch.full((2, 2), torch.nan)
RIGHT, LEFT = torch.cat([ROW, PADDING]), torch.cat([PADDING, ROW])
HIDDEN = torch.stack([RIGHT, LEFT])
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("pool", "expected"), [(last_token, [3.0, 30.0]), (mean, [2.0, 20.0]), (cls, [1.0, 10.0])]
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_tokens_are_found_with_padding_on_either_side(pool, expected, dtype):
    found = pool(HIDDEN.to(dtype), MASK)
    assert found.dtype == torch.float32
    assert found.tolist() == [expected, expected]


@pytest.mark.parametrize("pool", POOLINGS.values())
def test_a_row_of_one_token_or_without_padding_is_no_special_case(pool):
    one = pool(HIDDEN[:1], torch.tensor([[1, 0, 0, 0, 0]]))
    assert one.tolist() == [[1.0, 10.0]]
    assert pool(ROW[None], torch.ones(1, 3)).isfinite().all()


@pytest.mark.parametrize("pool", POOLINGS.values())
def test_the_kind_of_mask_does_not_matter(pool):
    for dtype in (torch.bool, torch.int32, torch.float32):
        assert torch.equal(pool(HIDDEN, MASK.to(dtype)), pool(HIDDEN, MASK))


def test_the_mean_of_bf16_states_is_taken_in_float32():
    hidden = torch.tensor([256.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16).view(1, 4, 1)
    assert mean(hidden, torch.ones(1, 4)).item() == 259 / 4  # bf16 would say 256 / 4
