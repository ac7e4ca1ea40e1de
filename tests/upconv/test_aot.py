"""The Triton kernels of the up-convolutions compiled for GPUs that are not here: no spill, matrix instructions used."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton")

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CASES = [(90, "bfloat16"), (90, "float32"), (80, "bfloat16"), (100, "bfloat16")]
SHAPES = [(2, 768, 768, 768, 14), (16, 1024, 4, 0, 14)]  # k, Cin, Cout, skip, size
_ON_THE_STACK = {100: 8}  # bytes, in the forward kernel into channels_last


def calls(capability: int, dtype: str, shape: tuple[int, ...]) -> list[dict]:
    scale, inputs, channels, skipped, size = shape

    def tensor(*shape: int) -> dict:
        return {"shape": shape, "dtype": dtype}

    fine = scale * size
    x, weight, bias = tensor(8, inputs, size, size), tensor(inputs, channels, scale, scale), tensor(channels)
    skip = tensor(8, skipped, fine, fine) if skipped else None
    proj_skip = tensor(channels, skipped) if skipped else None
    wanted = [
        ("concat", "run_forward", [x, weight, bias, skip, False, False]),
        ("concat", "run_forward", [x, weight, bias, skip, False, True]),
        ("concat", "run_backward", [tensor(8, channels, fine, fine), x, weight, [True] * 3]),
        ("project", "run_forward", [x, weight, bias, skip, None, proj_skip, False]),
    ]
    return [
        {
            "host": f"tokenfusion.kernels.upconv.{op}.triton_host",
            "call": call,
            "capability": capability,
            "arguments": arguments,
        }
        for op, call, arguments in wanted
    ]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[int, str], list[dict]]:
    """Each case's launches over all shapes, compiled by one process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    request = json.dumps([call for case in CASES for shape in SHAPES for call in calls(*case, shape)])
    program = [sys.executable, "-m", "tests.aot"]
    done = subprocess.run(
        program, input=request, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    launches = json.loads(done.stdout)
    each = len(launches) // len(CASES)
    return {case: sum(launches[i * each : (i + 1) * each], []) for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_spills(case, compiled):
    capability, dtype = case
    names = {kernel["name"] for kernel in compiled[case]}
    assert names == {"forward_kernel", "grad_x_kernel", "grad_weight_kernel"}
    for kernel in compiled[case]:
        assert kernel["spilled"] <= _ON_THE_STACK.get(capability, 0), kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel
        assert bool(kernel["matrix"]) == (dtype != "float32"), kernel
