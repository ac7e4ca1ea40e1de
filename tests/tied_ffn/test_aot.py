"""The Triton kernels of tied_ffn compiled for GPUs that are not here: no spill, tensor cores in half precision."""

import functools

import pytest

pytest.importorskip("triton")

from tests import aot

HOST = "tokenfusion.kernels.tied_ffn.triton_host"
SHAPES = [(90, dtype, channels) for dtype in ("bfloat16", "float32") for channels in (96, 128, 384, 1024)]
SHAPES += [
    (90, "float16", 384),
    (80, "bfloat16", 128),
    (80, "bfloat16", 384),
    (100, "bfloat16", 128),
    (100, "bfloat16", 384),
]
SHAPES += [(capability, "bfloat16", 384, form) for capability in (80, 90, 100) for form in ("small", "deep")]
NARROW = ["narrow_forward_kernel"]
WIDE = ["linear_kernel", "linear_kernel"]
BACKWARD = ["hidden_backward_kernel", "linear_kernel", "grad_weight_kernel"]


def calls(capability: int, dtype: str, channels: int, form: str = "") -> list[dict]:
    """Forward and backward with everything switched on."""
    tensor = functools.partial(aot.tensor, dtype=dtype)
    tokens, features = 12608, 4 * channels
    x, weight = tensor(tokens, channels), tensor(features, channels)
    biases = tensor(features), tensor(channels)
    forward = [x, weight, *biases, "gelu", False, form]
    backward = [x, x, weight, biases[0], tensor(0), "gelu", [True] * 4, form]
    return [aot.call(HOST, "run_forward", capability, forward), aot.call(HOST, "run_backward", capability, backward)]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple, list[dict]]:
    return aot.compile({shape: calls(*shape) for shape in SHAPES})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiles_without_spills(shape, compiled):
    capability, dtype, channels, *_ = shape
    kernels = compiled[shape]
    assert [kernel["name"] for kernel in kernels] == [*(NARROW if channels <= 128 else WIDE), *BACKWARD]
    for kernel in kernels:
        aot.check(kernel, capability, dtype)
