"""gated_sum's arguments: what is accepted, and what each error says."""

import pytest
import torch

import tokenfusion
from tests.parity import assert_runs
from tokenfusion.kernels import gated_sum
from tokenfusion.kernels.gated_sum import reference


def arguments(**changed) -> dict:
    made = dict(
        branches=[torch.randn(2, 5, 4), torch.randn(2, 5, 3)],
        weights=[torch.randn(6, 4), torch.randn(6, 3)],
        biases=[torch.randn(6), None],
        gates=torch.rand(2, 2, 6),
        proj_weight=torch.randn(7, 6),
        proj_bias=torch.randn(7),
    )
    return made | changed


@pytest.mark.parametrize(
    "changed, error, parts",
    [
        ({"biases": [None]}, ValueError, ["branches, weights, biases", "2, 2 and 1"]),
        ({"branches": [], "weights": [], "biases": []}, ValueError, ["branches, weights, biases"]),
        ({"branches": [torch.randn(5, 4), torch.randn(5, 3)]}, ValueError, ["branches[0]", "[B, T, D_in]"]),
        ({"branches": [torch.randn(2, 5, 4), torch.randn(2, 6, 3)]}, ValueError, ["branches[1]", "[2, 5, 3]"]),
        ({"weights": [torch.randn(6, 4), torch.randn(5, 3)]}, ValueError, ["weights[1]", "[6, 3]"]),
        ({"biases": [torch.randn(6), torch.randn(5)]}, ValueError, ["biases[1]", "[6]"]),
        ({"gates": torch.rand(3, 2, 6)}, ValueError, ["gates", "[2, 2, 6]"]),
        ({"proj_weight": torch.randn(7, 5)}, ValueError, ["proj_weight", "[7, 6]"]),
        ({"proj_bias": torch.randn(6)}, ValueError, ["proj_bias", "[7]"]),
        ({"out": torch.empty(2, 5, 6)}, ValueError, ["out", "[2, 5, 7]"]),
        ({"out": torch.empty(2, 7, 5).mT}, ValueError, ["out", "contiguous"]),
        ({"gates": torch.rand(2, 2, 6).double()}, TypeError, ["gates", "float64", "float32"]),
        ({"gates": torch.ones(2, 2, 6, dtype=torch.long)}, TypeError, ["gates", "int64"]),
    ],
)
def test_bad_arguments_are_named(changed, error, parts):
    with pytest.raises(error) as caught:
        gated_sum(**arguments(**changed))
    assert all(part in str(caught.value) for part in parts), caught.value


def test_out_takes_no_gradient():
    recorded = torch.randn(7, 6, requires_grad=True)
    with pytest.raises(ValueError, match="out: a gradient would be recorded"):
        gated_sum(**arguments(proj_weight=recorded, out=torch.empty(2, 5, 7)))


@pytest.mark.parametrize("projects", [True, False])
def test_gates_of_one_image_are_those_of_all(projects):
    made = arguments(gates=torch.rand(1, 2, 6))
    if not projects:
        made |= dict(proj_weight=None, proj_bias=None)
    expected = gated_sum(**made | dict(gates=made["gates"].expand(2, 2, 6)))
    out = torch.empty_like(expected)
    with torch.no_grad():
        assert gated_sum(**made, out=out) is out
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gated_sum(**made), expected)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_runs_on_the_reference_where_the_backend_in_force_cannot(backend):
    """It is a step of a layer, whose other operators the backend was chosen for."""
    made = arguments()
    wide = {
        name: [None if t is None else t.double() for t in value] if isinstance(value, list) else value.double()
        for name, value in made.items()
    }
    with torch.no_grad(), tokenfusion.backend(backend), assert_runs():
        torch.testing.assert_close(gated_sum(**wide), reference.gated_sum(**wide))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    with torch.autocast("cpu", dtype):
        assert gated_sum(**arguments()).dtype == dtype
