"""The Triton kernels of dynamic_mixing compiled for GPUs that are not here: no spill, products on the matrix units."""

import functools
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

triton = pytest.importorskip("triton")

HOST = "tokenfusion.kernels.dynamic_mixing.triton_host"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
STAGES = {
    "small 1": (32, 192, 8, 2),
    "small 2": (16, 384, 16, 2),
    "large 1": (32, 256, 8, 8),
    "large 2": (16, 512, 16, 8),
}

SHAPES = [(90, "bfloat16", stage) for stage in STAGES]
SHAPES += [(90, "float16", "small 1"), (90, "float32", "small 1"), (90, "float32", "small 2")]
SHAPES += [(80, "bfloat16", "small 1"), (80, "bfloat16", "small 2")]
SHAPES += [(100, "bfloat16", "small 1"), (100, "bfloat16", "small 2")]

# Bytes of a kernel's state in local memory; float32 runs without matrix units, on many more registers.
SPILLED = {
    (80, "bfloat16", "small 1"): 8,
    (90, "float32", "small 1"): 176,
}


def calls(capability: int, dtype: str, stage: str) -> list[dict]:
    """Forward and backward with everything switched on."""
    length, channels, segments, reduced = STAGES[stage]

    def tensor(*shape: int) -> dict:
        return dict(shape=shape, dtype=dtype)

    x, compressed = tensor(64, length, length, channels), tensor(64, length, length, segments * reduced)
    tensors = [x, compressed, tensor(length**2, length * reduced), tensor(length**2)]
    arguments = {
        "run_forward": [*tensors, segments, 1, True],
        "run_backward": [x, tensor(64, channels), *tensors, segments, 1, [True] * 4],
    }
    return [dict(host=HOST, call=call, capability=capability, arguments=args) for call, args in arguments.items()]


@functools.cache
def compiled() -> dict[tuple, list[dict]]:
    """Every shape's launches, compiled by one process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    request = json.dumps([call for shape in SHAPES for call in calls(*shape)])
    program = [sys.executable, "-m", "tests.aot"]
    done = subprocess.run(
        program, input=request, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    launches = iter(json.loads(done.stdout))
    return {shape: [*next(launches), *next(launches)] for shape in SHAPES}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiles_without_spills_and_for_the_matrix_units(shape):
    capability, dtype, _ = shape
    kernels = compiled()[shape]
    names = ["forward_kernel", "grad_x_kernel", "grad_compressed_kernel", "grad_weight_kernel"]
    assert [kernel["name"] for kernel in kernels] == names
    for kernel in kernels:
        assert kernel["spilled"] <= SPILLED.get(shape, 0), kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel
        assert bool(kernel["matrix"]) == (dtype != "float32"), kernel
