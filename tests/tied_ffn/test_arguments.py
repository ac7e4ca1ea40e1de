"""What tied_ffn accepts and refuses, whatever the backend."""

import pytest
import torch

import tokenfusion
from tests.parity import assert_runs
from tokenfusion.kernels import tied_ffn

N, C, F = 5, 6, 10


def arguments(**changed):
    made = dict(x=torch.randn(N, C), weight=torch.randn(F, C), bias_in=torch.randn(F), bias_out=torch.randn(C))
    return made | changed


@pytest.mark.parametrize(
    "changed, error, parts",
    [
        (dict(x=torch.randn(N, C + 1)), ValueError, ["x", "[5, 7]", "[..., 6]", "[10, 6]"]),
        (dict(x=torch.randn(())), ValueError, ["x", "[]", "[..., 6]"]),
        (dict(weight=torch.randn(C)), ValueError, ["weight", "[6]", "[F, C]"]),
        (dict(weight=torch.randn(F, C, 1, 1)), ValueError, ["weight", "[10, 6, 1, 1]", "[F, C]"]),
        (dict(weight=torch.randn(0, C)), ValueError, ["weight", "[0, 6]", "at least one"]),
        (dict(bias_in=torch.randn(C)), ValueError, ["bias_in", "[6]", "[10]"]),
        (dict(bias_out=torch.randn(F)), ValueError, ["bias_out", "[10]", "[6]"]),
        (dict(bias_out=torch.randn(1, C)), ValueError, ["bias_out", "[1, 6]", "[6]"]),
        (dict(activation="tanh"), ValueError, ["activation", "'tanh'", "'gelu'", "'identity'"]),
        (dict(x=torch.ones(N, C, dtype=torch.int64)), TypeError, ["x", "torch.int64", "float32"]),
        (dict(weight=torch.randn(F, C).double()), TypeError, ["weight", "float64", "float32", "x"]),
        (dict(bias_in=torch.randn(F).half()), TypeError, ["bias_in", "float16", "float32"]),
        (dict(weight=torch.randn(F, C, device="meta")), ValueError, ["weight", "meta", "cpu"]),
        (dict(x=[1.0]), TypeError, ["x", "list", "torch.Tensor"]),
        (dict(weight=None), TypeError, ["weight", "NoneType", "torch.Tensor"]),
    ],
)
def test_bad_input_names_the_argument(changed, error, parts):
    with pytest.raises(error) as caught:
        tied_ffn(**arguments(**changed))
    for part in parts:
        assert part in str(caught.value)


def test_no_backend_by_name_where_it_cannot_run():
    halves = {name: tensor.half() for name, tensor in arguments().items()}
    with tokenfusion.backend("cpu"), pytest.raises(RuntimeError, match="float16"):
        tied_ffn(**halves)
    with assert_runs():  # "auto" takes the reference
        tied_ffn(**halves)


def test_meta_tensors_give_shapes():
    meta = {name: tensor.to("meta") for name, tensor in arguments(x=torch.randn(2, N, C)).items()}
    assert tied_ffn(**meta).shape == (2, N, C)


def test_export_takes_the_reference():
    class Module(torch.nn.Module):
        def forward(self, x, weight):
            return tied_ffn(x, weight)

    inputs = torch.randn(N, C), torch.randn(F, C)
    program = torch.export.export(Module(), inputs)
    assert not any("tokenfusion" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), Module()(*inputs))
