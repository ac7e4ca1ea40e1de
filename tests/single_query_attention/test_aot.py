"""The Triton kernels of single_query_attention compiled for GPUs that are not here: no spill, one read of tokens."""

import functools

import pytest

pytest.importorskip("triton")

import triton

from tests import aot

HOST = "tokenfusion.kernels.single_query_attention.triton_host"
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
CROSSVIT = {96: 3, 128: 4, 192: 6, 224: 7, 256: 4, 384: 12, 448: 7, 768: 12}  # C: heads

SHAPES = [(90, dtype, channels, heads) for dtype in ("bfloat16", "float32") for channels, heads in CROSSVIT.items()]
SHAPES += [(90, "float16", 192, 3), (90, "float16", 768, 12), (90, "bfloat16", 1024, 16), (90, "bfloat16", 256, 32)]
SHAPES += [(80, "bfloat16", 192, 6), (80, "bfloat16", 448, 7), (80, "float32", 192, 6)]
SHAPES += [(100, "bfloat16", 192, 6), (100, "bfloat16", 768, 12), (100, "float32", 192, 6)]
WIDE = [(90, "bfloat16", 2048, 16), (90, "float32", 4096, 32), (80, "float16", 1152, 16), (100, "bfloat16", 1280, 16)]

# The tiles were chosen with Triton 3.6; later ones keep these few bytes of a kernel's state in local memory.
SPILLED = {(90, "float32", 448): 8, (90, "float32", 768): 160, (90, "bfloat16", 256): 336, (100, "bfloat16", 768): 24}
CHOSEN_WITH = (3, 6)


def calls(capability: int, dtype: str, channels: int, queries: int) -> list[dict]:
    """Forward and backward over a batch that needs no split, with everything switched on."""
    tensor = functools.partial(aot.tensor, dtype=dtype)
    batch, tokens = 256, 401
    query, x, extra = tensor(batch, queries, channels), tensor(batch, tokens, channels), tensor(batch, channels)
    lse = tensor(batch, queries, dtype="float32")
    forward = [query, x, extra, None, None, True, 1e-6]
    backward = [query, query, x, extra, None, None, query, lse, True, 1e-6, [True, True, True]]
    return [aot.call(HOST, "run_forward", capability, forward), aot.call(HOST, "run_backward", capability, backward)]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple, list[dict]]:
    return aot.compile({shape: calls(*shape) for shape in SHAPES + WIDE})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiles_without_spills_and_reads_tokens_once(shape, compiled):
    capability, dtype, channels, _ = shape
    kernels = compiled[shape]
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    allowed = 0 if version == CHOSEN_WITH else SPILLED.get(shape[:3], 0)
    assert [kernel["name"] for kernel in kernels] == ["forward_kernel", "backward_kernel"]
    for kernel in kernels:
        aot.check(kernel, capability, dtype, allowed)
        assert kernel["loop_bytes"] == kernel["arguments"]["BN"] * channels * ITEMSIZE[dtype], kernel
        assert kernel["narrowest_load"] >= 8, kernel


@pytest.mark.parametrize("shape", WIDE, ids=str)
def test_more_channels_compile_without_spills(shape, compiled):
    capability, dtype, *_ = shape
    scores, log_sum_exp, total, *backward = compiled[shape]
    names = ["scores_kernel", "scores_kernel", "sum_kernel", "token_gradients_kernel"]
    assert [kernel["name"] for kernel in (scores, log_sum_exp, total)] == [names[0], "log_sum_exp_kernel", names[2]]
    assert [kernel["name"] for kernel in backward] == names
    assert log_sum_exp["spilled"] == 0
    for kernel in (scores, total, *backward):
        aot.check(kernel, capability, dtype)
