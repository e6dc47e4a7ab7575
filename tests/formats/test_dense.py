"""Dense tensors are handed on as they are, and every row of the catalog has a reader."""

import pytest
import torch

from pipeline import formats
from pipeline.catalog import FORMATS
from pipeline.formats import dense
from pipeline.shards import TensorGroup


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS)
def test_every_row_of_the_catalog_has_a_reader(row):
    reader = formats.load(row)
    assert callable(reader.dense_shape)
    assert callable(reader.dequantize)


def test_a_dense_tensor_is_not_copied():
    tensor = torch.arange(6).reshape(2, 3)
    group = TensorGroup(module="norm", dense_name="norm.steps", tensors={"steps": tensor}, packed=False)
    assert dense.dequantize(group) is tensor
    assert dense.dense_shape(group) == (2, 3)
