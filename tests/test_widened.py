"""Half precision that the processor has no instructions for is multiplied in float32."""

import pytest
import torch
from torch.autograd import profiler
from torch.nn import functional as F

import tokenfusion
from tests.gradients import in_float64, with_gradients
from tests.parity import assert_parity
from tokenfusion import kernels
from tokenfusion.kernels.linear import linear
from tokenfusion.kernels.widened import is_widened
from tokenfusion.layers import SingleQueryAttention

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}


def tensors(*shapes, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)


MAPS = (2, 16, 12, 12), (16, 24, 2, 2), (24,), (2, 12, 24, 24)
CALLS = {  # an operator, and the shapes of its operands and of its result
    "tied_ffn": (kernels.tied_ffn, [(64, 32), (48, 32), (48,), (32,)], (64, 32)),
    "tied_ffn, holding": (
        lambda *tensors: kernels.tied_ffn(*tensors, recompute=False),
        [(64, 32), (48, 32), (48,), (32,)],
        (64, 32),
    ),
    "upconv_concat": (kernels.upconv_concat, MAPS, (2, 36, 24, 24)),
    "upconv_add": (kernels.upconv_add, [*MAPS[:3], (2, 24, 24, 24)], (2, 24, 24, 24)),
    "upconv_concat_project": (kernels.upconv_concat_project, [*MAPS, (8, 36), (8,)], (2, 8, 24, 24)),
}


@pytest.fixture
def without_instructions():
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def dtypes_of_products(call, products=PRODUCTS) -> list[str]:
    with profiler.profile(record_shapes=True) as profile:
        call()
    events = profile.kineto_results.events()
    return [dtype for event in events if event.name() in products for dtype in event.dtypes() if "loat" in dtype]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.backend("cpu")
@pytest.mark.usefixtures("without_instructions", "one_thread")
def test_operators(name):
    function, shapes, out = CALLS[name]
    inputs = tensors(*shapes, out)
    got = []
    assert set(dtypes_of_products(lambda: got.extend(with_gradients(function, inputs)))) == {"float"}
    with tokenfusion.backend("reference"):
        expected, exact = with_gradients(function, inputs), with_gradients(function, in_float64(inputs))
    for triple in zip(got, expected, exact, strict=True):
        assert_parity(*triple)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.usefixtures("without_instructions")
def test_linear(dtype, activation):
    x, weight, bias = (t.detach() for t in tensors((2, 300, 40), (56, 40), (56,), dtype=dtype))
    assert is_widened(dtype)
    with torch.no_grad():
        ran = dtypes_of_products(lambda: linear(x, weight, bias, activation))
        expected = F.linear(x.float(), weight.float(), bias.float()).to(dtype)
        expected = F.gelu(expected) if activation else expected
        assert set(ran) == {"float"}
        torch.testing.assert_close(linear(x, weight, bias, activation), expected)
        few = dtypes_of_products(lambda: linear(x[0, :2], weight, bias, activation))
        assert "float" not in few


@pytest.mark.usefixtures("without_instructions")
def test_what_overflows_float16_before_the_activation():
    x, weight = torch.full((300, 40), 100.0).half(), torch.full((8, 40), -100.0).half()
    with torch.no_grad():
        expected = F.gelu(F.linear(x, weight))
        assert expected.isnan().all()
        torch.testing.assert_close(linear(x, weight, None, "gelu"), expected, equal_nan=True)


@pytest.mark.usefixtures("without_instructions", "one_thread")
def test_the_projections_of_a_layer():
    layer = SingleQueryAttention(32, 4, num_latents=2).bfloat16()
    few, many = (torch.randn(batch, 9, 32).bfloat16() for batch in (2, 8))
    for tokens, widened in ((few, False), (many, True)):
        ran = dtypes_of_products(lambda tokens=tokens: layer(tokens), {"aten::bmm"})  # other projections are modules
        assert ("float" in ran) == widened and "c10::BFloat16" in ran  # that of the two learned queries


def test_where_the_library_has_instructions():
    assert is_widened(torch.bfloat16) != torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert is_widened(torch.float16) != torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert not is_widened(torch.float32) and not is_widened(torch.float64)
