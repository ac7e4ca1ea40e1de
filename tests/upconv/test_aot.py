"""The Triton kernels of the up-convolutions compiled for GPUs that are not here: no spill, matrix instructions used."""

import functools

import pytest

pytest.importorskip("triton")

from tests import aot

CASES = [(90, "bfloat16", ""), (90, "float32", ""), (80, "bfloat16", ""), (100, "bfloat16", "")]
CASES += [(capability, "bfloat16", "deep") for capability in (80, 90, 100)]
SHAPES = [(2, 768, 768, 768, 14), (16, 1024, 4, 0, 14)]  # k, Cin, Cout, skip, size


def calls(capability: int, dtype: str, form: str, shape: tuple[int, ...]) -> list[dict]:
    scale, inputs, channels, skipped, size = shape
    tensor = functools.partial(aot.tensor, dtype=dtype)
    fine = scale * size
    x, weight, bias = tensor(8, inputs, size, size), tensor(inputs, channels, scale, scale), tensor(channels)
    skip = tensor(8, skipped, fine, fine) if skipped else None
    proj_skip = tensor(channels, skipped) if skipped else None
    wanted = [
        ("concat", "run_forward", [x, weight, bias, skip, False, False, form]),
        ("concat", "run_forward", [x, weight, bias, skip, False, True, form]),
        ("concat", "run_backward", [tensor(8, channels, fine, fine), x, weight, [True] * 3, form]),
        ("project", "run_forward", [x, weight, bias, skip, None, proj_skip, False, form]),
    ]
    return [
        aot.call(f"tokenfusion.kernels.upconv.{op}.triton_host", function, capability, arguments)
        for op, function, arguments in wanted
    ]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple, list[dict]]:
    return aot.compile({case: [call for shape in SHAPES for call in calls(*case, shape)] for case in CASES})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_spills(case, compiled):
    capability, dtype, _ = case
    names = {kernel["name"] for kernel in compiled[case]}
    assert names == {"forward_kernel", "grad_x_kernel", "grad_weight_kernel"}
    for kernel in compiled[case]:
        aot.check(kernel, capability, dtype)
