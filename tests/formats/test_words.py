"""Unpacking is the inverse of laying codes in a bit stream."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.formats.words import pack, unpack, unpack_floats
from tests.formats.groups import words


def test_eight_nibbles_come_out_lowest_first():
    assert unpack(torch.tensor([0x76543210]), 4).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_the_sign_bit_of_a_word_is_a_bit_like_any_other():
    assert unpack(torch.tensor([-1], dtype=torch.int32), 8).tolist() == [255] * 4
    assert unpack(torch.tensor([-(2**31)], dtype=torch.int32), 2).tolist() == [0] * 15 + [2]


def test_three_bit_codes_straddle_words():
    """Code 10 lies in bits 30..32, code 21 in bits 63..65."""
    low = torch.tensor([-(2**31) | 2**30, 1, 0], dtype=torch.int32)
    assert unpack(low, 3)[10] == 7
    high = torch.tensor([0, -(2**31), 3], dtype=torch.int32)
    assert unpack(high, 3)[21] == 7
    assert unpack(high, 3).sum() == 7


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@given(data=st.data())
def test_any_codes_come_back(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=32, max_size=32)) * 2
    stored = torch.tensor([words(codes, bits)], dtype=torch.int32)
    assert unpack(stored, bits).tolist() == [codes]
    assert unpack(stored.expand(3, 2, -1), bits).tolist() == [[codes] * 2] * 3


def test_eight_nibbles_go_in_lowest_first():
    assert pack(torch.arange(8, dtype=torch.uint8), 4).tolist() == [0x76543210]


@pytest.mark.parametrize(("bits", "code"), [(2, 2), (4, 8), (8, 128)])
def test_a_word_that_is_not_full_ends_in_zeros(bits, code):
    assert pack(torch.tensor([code], dtype=torch.uint8), bits).tolist() == [code]
    full = torch.full((32 // bits + 1,), code, dtype=torch.uint8)
    assert pack(full, bits).tolist() == words(full.tolist(), bits)


@pytest.mark.parametrize("bits", range(2, 9))
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 3), turned=st.booleans())
def test_packed_codes_are_one_bit_stream_and_come_back(bits, seed, rows, blocks, turned):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, blocks * 32), dtype=torch.uint8, generator=generator)
    stored = pack(codes.T.contiguous().T if turned else codes, bits)
    assert stored.dtype == torch.int32
    assert stored.tolist() == [words(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(stored, bits), codes.int())
    assert torch.equal(pack(codes.expand(2, -1, -1), bits), stored.expand(2, -1, -1))


@pytest.mark.parametrize("bits", range(2, 9))
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 3))
def test_floats_are_the_same_codes(bits, seed, rows, blocks):
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(-(2**31), 2**31, (rows, blocks * bits), dtype=torch.int32, generator=generator)
    out = torch.empty(rows, blocks * 32)
    unpack_floats(stored, bits, out)
    assert torch.equal(out, unpack(stored, bits).float())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_column_of_words_is_read_as_a_row_is(bits):
    """[N, 1] counts as contiguous whatever its strides are."""
    column = torch.arange(7, dtype=torch.int32).reshape(1, 7).T.contiguous()
    out = torch.empty(7, 32 // bits)
    unpack_floats(column, bits, out)
    assert torch.equal(out, unpack(column, bits).float())
