"""What the up-convolutions accept and refuse, whatever the backend."""

import pytest
import torch

import tokenfusion
from tests.parity import assert_runs
from tests.upconv.cases import OPS, make_inputs
from tokenfusion.kernels import upconv_add, upconv_concat, upconv_concat_project


def arguments(**changed):
    names = ("x", "weight", "bias", "skip")
    return dict(zip(names, (t.detach() for t in make_inputs()), strict=False)) | changed


@pytest.mark.parametrize(
    "changed, error, parts",
    [
        ({"x": torch.randn(5, 3, 5)}, ValueError, ["x", "[5, 3, 5]", "[B, Cin, h, w]"]),
        ({"x": None}, TypeError, ["x", "NoneType"]),
        ({"x": torch.ones(2, 5, 3, 5, dtype=torch.int64)}, TypeError, ["x", "torch.int64", "float32"]),
        ({"x": torch.randn(2, 6, 3, 5)}, ValueError, ["weight", "[5, 3, 2, 2]", "[6, Cout, k, k]"]),
        ({"x": torch.randn(2, 5, 0, 5)}, ValueError, ["[2, 5, 0, 5]", "no size of 0"]),
        ({"weight": torch.randn(5, 3, 2, 3)}, ValueError, ["weight", "2 x 3", "square"]),
        ({"weight": torch.randn(5, 3, 2, 2).double()}, TypeError, ["weight", "float64", "float32"]),
        ({"bias": torch.randn(4)}, ValueError, ["bias", "[4]", "[3]"]),
        ({"skip": torch.randn(2, 4, 6, 9)}, ValueError, ["skip", "[2, 4, 6, 9]", "[2, Cs, 6, 10]"]),
        ({"skip": torch.randn(3, 4, 6, 10)}, ValueError, ["skip", "[3, 4, 6, 10]", "[2, Cs, 6, 10]"]),
        ({"skip": torch.randn(2, 4, 6, 10, device="meta")}, ValueError, ["skip", "meta", "cpu"]),
        ({"out": torch.empty(2, 8, 6, 10)}, ValueError, ["out", "[2, 8, 6, 10]", "[2, 7, 6, 10]"]),
        ({"out": torch.empty(2, 7, 6, 20)[..., ::2]}, ValueError, ["out", "strides"]),
        ({"out": torch.empty(2, 7, 6, 10, requires_grad=True)}, ValueError, ["out", "no_grad"]),
    ],
)
def test_bad_input_is_named(changed, error, parts):
    with pytest.raises(error) as caught:
        upconv_concat(**arguments(**changed))
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    "changed, parts",
    [
        ({"proj_weight": torch.randn(6, 8)}, ["proj_weight", "[6, 8]", "[Cp, 7]"]),
        ({"proj_weight": torch.randn(6, 7, 1, 1)}, ["proj_weight", "[6, 7, 1, 1]", "[Cp, Cout + Cs]"]),
        ({"proj_bias": torch.randn(5)}, ["proj_bias", "[5]", "[6]"]),
    ],
)
def test_bad_projections_are_named(changed, parts):
    made = arguments(proj_weight=torch.randn(6, 7), proj_bias=torch.randn(6)) | changed
    with pytest.raises(ValueError) as caught:
        upconv_concat_project(**made)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("skip", [None, torch.randn(2, 4, 6, 10)])
def test_sum_needs_a_skip_of_its_channels(skip):
    with pytest.raises(ValueError, match="skip: got .* expected a tensor of the 3 channels"):
        upconv_add(**arguments(skip=skip))


@pytest.mark.parametrize("op", OPS)
def test_other_kernels_and_dtypes_run_on_the_reference(op):
    for inputs in (make_inputs(op, scale=3), make_inputs(op, dtype=torch.float16)):
        function, definition = OPS[op]
        with assert_runs(), torch.no_grad():
            torch.testing.assert_close(function(*inputs[:-1]), definition(*inputs[:-1]), rtol=1e-2, atol=1e-2)
        with tokenfusion.backend("cpu"), pytest.raises(RuntimeError, match=rf"{function.__name__}: .*(k = 3|float16)"):
            function(*inputs[:-1])


def test_exports_the_definition():
    class Module(torch.nn.Module):
        def forward(self, x, weight, bias, skip):
            return upconv_concat(x, weight, bias, skip)

    made = tuple(arguments().values())
    exported = torch.export.export(Module(), made)
    assert "tokenfusion" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(*made), upconv_concat(*made))
