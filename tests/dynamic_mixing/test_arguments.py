"""What dynamic_mixing accepts and refuses, whatever the backend."""

import pytest
import torch

import tokenfusion
from tests.dynamic_mixing.cases import make_inputs
from tests.parity import assert_runs
from tokenfusion.kernels import dynamic_mixing

B, H, W, D, S, R = 2, 3, 4, 12, 6, 2
NAMES = ("x", "compress_weight", "compress_bias", "generate_weight", "generate_bias")


def arguments(**changed):
    *tensors, _ = (t.detach() for t in make_inputs(B, H, W, D, segments=S, dim=2, reduced=R))
    return dict(zip(NAMES, tensors, strict=True)) | dict(segments=S, dim=2) | changed


@pytest.mark.parametrize(
    "changed, error, parts",
    [
        (dict(x=torch.randn(B, H * W, D)), ValueError, ["x", "[2, 12, 12]", "[B, H, W, D]"]),
        (dict(x=torch.randn(B, H, W, D + 6)), ValueError, ["compress_weight", "[12, 12]", "[12, 18]"]),
        (dict(x=torch.randn(B, H, W + 1, D)), ValueError, ["generate_weight", "[16, 8]", "[25, 10]", "N = 5"]),
        (dict(x=torch.randn(B, H, 0, D)), ValueError, ["x", "[2, 3, 0, 12]", "at least one token"]),
        (dict(compress_weight=torch.randn(D)), ValueError, ["compress_weight", "[12]", "[S * d, D]"]),
        (dict(compress_weight=torch.randn(13, D)), ValueError, ["compress_weight", "[13, 12]", "S = 6"]),
        (dict(compress_weight=torch.randn(0, D)), ValueError, ["compress_weight", "[0, 12]", "S = 6"]),
        (dict(compress_bias=torch.randn(7)), ValueError, ["compress_bias", "[7]", "[12]"]),
        (dict(generate_weight=torch.randn(16, 7)), ValueError, ["generate_weight", "[16, 7]", "[16, 8]", "d = 2"]),
        (dict(generate_weight=torch.randn(9, 8)), ValueError, ["generate_weight", "[9, 8]", "[16, 8]", "N = 4"]),
        (dict(generate_weight=torch.randn(16)), ValueError, ["generate_weight", "[16]", "[N * N, N * d]"]),
        (dict(generate_bias=torch.randn(9)), ValueError, ["generate_bias", "[9]", "[16]"]),
        (dict(generate_bias=torch.randn(16, 1)), ValueError, ["generate_bias", "[16, 1]"]),
        (dict(segments=5), ValueError, ["segments", "5", "D = 12"]),
        (dict(segments=0), ValueError, ["segments", "0", "D = 12"]),
        (dict(segments=2.0), ValueError, ["segments", "2.0", "D = 12"]),
        (dict(segments=4), ValueError, ["generate_weight", "[16, 8]", "[16, 12]", "d = 3"]),
        (dict(dim=0), ValueError, ["dim", "0", "1", "2"]),
        (dict(dim=3), ValueError, ["dim", "3", "1", "2"]),
        (dict(dim=-2), ValueError, ["dim", "-2", "1", "2"]),
        (dict(dim=1), ValueError, ["generate_weight", "[16, 8]", "[9, 6]", "dimension 1"]),
        (dict(x=torch.ones(B, H, W, D, dtype=torch.int64)), TypeError, ["x", "torch.int64", "float32"]),
        (dict(generate_weight=torch.randn(16, 8).double()), TypeError, ["generate_weight", "float64", "float32"]),
        (dict(compress_bias=torch.randn(12, device="meta")), ValueError, ["compress_bias", "meta", "cpu"]),
        (dict(generate_bias=None), TypeError, ["generate_bias", "NoneType", "torch.Tensor"]),
        (dict(x=[1.0]), TypeError, ["x", "list", "torch.Tensor"]),
    ],
)
def test_bad_input_names_the_argument(changed, error, parts):
    with pytest.raises(error) as caught:
        dynamic_mixing(**arguments(**changed))
    for part in parts:
        assert part in str(caught.value)


def test_no_backend_by_name_where_it_cannot_run():
    transposed = torch.randn(B, H, D, W).transpose(2, 3)
    cases = {
        "float16": {name: t.half() if isinstance(t, torch.Tensor) else t for name, t in arguments().items()},
        "innermost": arguments(x=transposed),
        "N = 65": dict(zip(NAMES, make_inputs(1, 1, 65, 4, segments=2, dim=2, reduced=1))) | dict(segments=2, dim=2),
        "d = 17": dict(zip(NAMES, make_inputs(1, 1, 3, 4, segments=2, dim=2, reduced=17))) | dict(segments=2, dim=2),
    }
    for part, call in cases.items():
        with tokenfusion.backend("cpu"), pytest.raises(RuntimeError, match=part):
            dynamic_mixing(**call)
        with assert_runs():  # "auto" takes the reference
            dynamic_mixing(**call)


def test_meta_tensors_give_shapes():
    call = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in arguments().items()}
    assert dynamic_mixing(**call).shape == (B, H, W, D)


def test_export_takes_the_reference():
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return dynamic_mixing(*tensors, segments=S, dim=2)

    inputs = tuple(arguments()[name] for name in NAMES)
    program = torch.export.export(Module(), inputs)
    assert not any("tokenfusion" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), Module()(*inputs))
