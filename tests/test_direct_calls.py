"""The registered operators of the CPU, called directly with operands that the public functions would not pass on."""

import pytest
import torch

import tokenfusion.kernels  # noqa: F401  (registers them)

OPS = torch.ops.tokenfusion
X, WEIGHT = torch.randn(2, 3, 4, 5), torch.randn(3, 4, 2, 2)


def upconv(**changes):
    given = dict(x=X, weight=WEIGHT, bias=None, skip=None) | changes
    return OPS.upconv_concat_cpu(*given.values(), False, False)


def ffn(**changes):
    given = dict(x=torch.randn(5, 8), weight=torch.randn(16, 8), bias_in=torch.randn(16), bias_out=None) | changes
    return OPS.tied_ffn_cpu(*given.values(), "gelu", False)


def mixing(**changes):
    sizes = dict(x=(2, 4, 3, 8), compressed=(2, 4, 3, 4), generate_weight=(16, 8), generate_bias=(16,))
    given = {name: torch.randn(shape) for name, shape in sizes.items()} | changes
    return OPS.dynamic_mixing_cpu(*given.values(), 2, 1, False)


def attention(**changes):
    given = dict(query=torch.randn(2, 3, 8), tokens=torch.randn(2, 9, 8), extra_token=None) | changes
    return OPS.single_query_attention_cpu(*given.values(), False, 1e-6)


@pytest.mark.parametrize("operator", [upconv, ffn, mixing, attention])
def test_what_is_right_runs(operator):
    operator()


@pytest.mark.parametrize(
    "operator, changes",
    [
        (upconv, dict(bias=torch.randn(3))),
        (upconv, dict(bias=torch.randn(4).double())),
        (upconv, dict(weight=torch.randn(3, 4, 3, 3))),
        (upconv, dict(weight=torch.randn(3, 4, 0, 0))),
        (upconv, dict(skip=torch.randn(2, 1, 8, 9))),
        (ffn, dict(bias_in=torch.randn(15))),
        (ffn, dict(weight=torch.randn(16, 8).double())),
        (ffn, dict(weight=torch.randn(0, 8), bias_in=None)),
        (mixing, dict(generate_bias=torch.randn(15))),
        (mixing, dict(generate_weight=torch.randn(16, 7))),
        (mixing, dict(compressed=torch.randn(2, 4, 2, 4))),
        (mixing, dict(generate_bias=torch.randn(16).bfloat16())),
        (attention, dict(query=torch.randn(1, 3, 8))),
        (attention, dict(query=torch.randn(2, 3, 8).double())),
        (attention, dict(extra_token=torch.randn(2, 7))),
    ],
)
def test_what_is_too_short_or_of_another_dtype_is_an_error(operator, changes):
    with pytest.raises((ValueError, TypeError), match="expected"):
        operator(**changes)


@pytest.mark.parametrize("name", ["skip", "x"])
def test_odd_strides_of_sizes_of_one(name):
    """They describe the same elements, and is_contiguous says so."""
    given = dict(x=torch.randn(4, 48, 1, 1), skip=torch.randn(4, 16, 2, 2).to(memory_format=torch.channels_last))
    if name == "x":
        given["x"] = given["x"].as_strided((4, 48, 1, 1), (48, 1, 48, 1))
    weight, bias = torch.randn(48, 16, 2, 2), torch.randn(16)
    with tokenfusion.backend("cpu"):
        got = tokenfusion.kernels.upconv_concat(given["x"], weight, bias, given["skip"])
    with tokenfusion.backend("reference"):
        expected = tokenfusion.kernels.upconv_concat(given["x"].clone(), weight, bias, given["skip"])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

