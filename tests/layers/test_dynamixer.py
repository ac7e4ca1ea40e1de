"""The DynaMixer layers against the official code's values and against the plain form."""

import pytest
import torch

from tests.golden import check_golden
from tokenfusion import layers

GOLDEN = "dynamixer_official.safetensors"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_op_has_the_official_values(dtype):
    check_golden(GOLDEN, "op.", layers.DynaMixerOp(24, 8, 4, 2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_has_the_official_values(dtype):
    check_golden(GOLDEN, "block.", layers.DynaMixerBlock(24, 8, 4, 2, dtype=dtype))
