"""The Triton kernels of dynamic_mixing compiled for GPUs that are not here: no spill, products on the matrix units."""

import functools

import pytest

pytest.importorskip("triton")

from tests import aot

HOST = "tokenfusion.kernels.dynamic_mixing.triton_host"
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
    tensor = functools.partial(aot.tensor, dtype=dtype)
    x, compressed = tensor(64, length, length, channels), tensor(64, length, length, segments * reduced)
    tensors = [x, compressed, tensor(length**2, length * reduced), tensor(length**2)]
    forward = [*tensors, segments, 1, True]
    backward = [x, tensor(64, channels), *tensors, segments, 1, [True] * 4]
    return [aot.call(HOST, "run_forward", capability, forward), aot.call(HOST, "run_backward", capability, backward)]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple, list[dict]]:
    return aot.compile({shape: calls(*shape) for shape in SHAPES})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiles_without_spills_and_for_the_matrix_units(shape, compiled):
    capability, dtype, _ = shape
    kernels = compiled[shape]
    names = ["forward_kernel", "grad_x_kernel", "grad_compressed_kernel", "grad_weight_kernel"]
    assert [kernel["name"] for kernel in kernels] == names
    for kernel in kernels:
        aot.check(kernel, capability, dtype, SPILLED.get(shape, 0))
