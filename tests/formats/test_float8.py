"""Every float8 there is becomes the float32 that torch makes of it."""

import pytest
import torch

from pipeline.formats.float8 import to_float32


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_all_256_come_out_as_torch_has_them(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert torch.equal(to_float32(codes).nan_to_num(nan=1e9), codes.float().nan_to_num(nan=1e9))
    numbers = codes[codes.float().isfinite()].view(2, -1)
    assert torch.equal(to_float32(numbers), numbers.float())
    assert to_float32(numbers).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_nan_among_numbers_stays_one(dtype):
    codes = torch.tensor([1.0, torch.nan, -2.0]).to(dtype)
    assert to_float32(codes).isnan().tolist() == [False, True, False]


def test_none_at_all_become_none():
    assert to_float32(torch.empty(0, 4, dtype=torch.float8_e4m3fn)).shape == (0, 4)
