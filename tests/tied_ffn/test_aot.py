"""The Triton kernels of tied_ffn compiled for GPUs that are not here: no spill, tensor cores in half precision."""

import functools
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

triton = pytest.importorskip("triton")

HOST = "tokenfusion.kernels.tied_ffn.triton_host"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SHAPES = [(90, dtype, channels) for dtype in ("bfloat16", "float32") for channels in (96, 128, 384, 1024)]
SHAPES += [
    (90, "float16", 384),
    (80, "bfloat16", 128),
    (80, "bfloat16", 384),
    (100, "bfloat16", 128),
    (100, "bfloat16", 384),
]
NARROW = ["narrow_forward_kernel"]
WIDE = ["linear_kernel", "linear_kernel"]
BACKWARD = ["hidden_backward_kernel", "linear_kernel", "grad_weight_kernel"]


def _calls(capability: int, dtype: str, channels: int) -> list[dict]:
    """Forward and backward with everything switched on."""

    def tensor(*shape: int) -> dict:
        return {"shape": shape, "dtype": dtype}

    tokens, features = 12608, 4 * channels
    x, weight = tensor(tokens, channels), tensor(features, channels)
    biases = tensor(features), tensor(channels)
    forward = [x, weight, *biases, "gelu", False]
    backward = [x, x, weight, biases[0], tensor(0), "gelu", [True] * 4]
    return [
        {"host": HOST, "call": call, "capability": capability, "arguments": arguments}
        for call, arguments in (("run_forward", forward), ("run_backward", backward))
    ]


@functools.cache
def _compiled() -> dict[tuple, list[dict]]:
    """Every shape's launches, compiled by one process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    request = json.dumps([call for shape in SHAPES for call in _calls(*shape)])
    program = [sys.executable, "-m", "tests.aot"]
    done = subprocess.run(
        program, input=request, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    launches = iter(json.loads(done.stdout))
    return {shape: [*next(launches), *next(launches)] for shape in SHAPES}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiles_without_spills(shape):
    capability, dtype, channels = shape
    kernels = _compiled()[shape]
    assert [kernel["name"] for kernel in kernels] == [*(NARROW if channels <= 128 else WIDE), *BACKWARD]
    for kernel in kernels:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel
        assert bool(kernel["matrix"]) == (dtype != "float32"), kernel
