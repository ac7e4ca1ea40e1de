"""The fused linear layer against PyTorch's, and where it runs."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import tokenfusion
from tests.parity import assert_parity
from tokenfusion.kernels import choices, dispatch
from tokenfusion.kernels.choices import Table, Workload
from tokenfusion.kernels.linear import linear

ONEDNN = "mkldnn::_linear_pointwise"


def operators(call) -> set[str]:
    with torch.autograd.profiler.profile() as profile:
        call()
    return {event.name for event in profile.function_events}


def tensors(rows=(3, 67), dtype=torch.float32, transposed=False):
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(*rows, 40, generator=generator), torch.randn(56, generator=generator)
    weight = torch.randn(40, 56, generator=generator).t() if transposed else torch.randn(56, 40, generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "kind", ["plain", "transposed weight", "overlapping weight", "sliced input", "few rows", "no rows"]
)
def test_against_pytorch(dtype, activation, with_bias, kind):
    rows = {"few rows": (3, 5), "no rows": (0, 67)}.get(kind, (3, 67))
    x, weight, bias = tensors(rows, dtype, transposed=kind == "transposed weight")
    if kind == "overlapping weight":
        weight = weight.flatten().unfold(0, 40, 20)[:56]
    if kind == "sliced input":
        x = x[:, 1:]
    bias = bias if with_bias else None

    def unfused(*arguments):
        out = F.linear(*arguments)
        return out if activation is None else F.gelu(out)

    with torch.inference_mode():
        actual, expected = linear(x, weight, bias, activation), unfused(x, weight, bias)
        exact = unfused(x.double(), weight.double(), None if bias is None else bias.double())
    assert_parity(actual, expected, exact)


def usable(dtype) -> bool:
    return torch.backends.mkldnn.is_available() and (
        dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_operator_in_inference(dtype):
    if not usable(dtype):
        pytest.skip(f"oneDNN has no {dtype} product on this processor")
    x, weight, bias = tensors(dtype=dtype)
    with torch.no_grad():
        ran = operators(lambda: linear(x, weight, bias, "gelu"))
    assert ONEDNN in ran
    assert not any("addmm" in name or "aten::gelu" in name for name in ran)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_what_was_measured_is_followed(activation):
    x, weight, bias = tensors()
    kind = ("float32", "inference") if activation is None else ("float32", "inference", activation)
    table = Table({Workload("linear", kind, (3 * 67, 40, 56)): "reference"})
    with torch.no_grad(), choices.using(table):
        assert ONEDNN not in operators(lambda: linear(x, weight, bias, activation))
        unlike = None if activation else "gelu"
        assert ONEDNN in operators(lambda: linear(x, weight, bias, unlike))


def test_training_asks_for_no_measurement():
    x, weight, bias = tensors()
    with dispatch.observe() as seen:
        linear(x, weight.requires_grad_(), bias)
        with torch.no_grad():
            linear(x, weight, bias)
    assert [choice.workload.kind[1] for choice in seen.choices] == ["inference"]


def few_rows(x, weight, bias):
    return linear(x[0], weight, bias)


def reference_backend(x, weight, bias):
    with tokenfusion.backend("reference"):
        return linear(x, weight, bias)


def autocast(x, weight, bias):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return linear(x, weight, bias)


def forward_mode_derivative(x, weight, bias):
    with forward_ad.dual_level():
        out = linear(forward_ad.make_dual(x, torch.ones_like(x)), weight, bias)
        assert forward_ad.unpack_dual(out).tangent is not None


@pytest.mark.parametrize("call", [few_rows, reference_backend, autocast, forward_mode_derivative])
def test_pytorchs_product_elsewhere(call):
    with torch.no_grad():
        assert ONEDNN not in operators(lambda: call(*tensors()))


def test_with_gradients():
    x, weight, bias = (tensor.double().requires_grad_() for tensor in tensors((2, 70)))
    assert ONEDNN not in operators(lambda: linear(x, weight, bias, "gelu"))
    assert torch.autograd.gradcheck(
        lambda *a: linear(*a, "gelu"), [t.detach()[:3].requires_grad_() for t in (x[0], weight, bias)]
    )


def test_compiles_without_graph_breaks():
    torch.compiler.reset()
    x, weight, bias = tensors()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight, bias, "gelu"), F.gelu(F.linear(x, weight, bias)))


def test_a_subclass_of_tensor_keeps_its_own_product():
    class Quantized(torch.Tensor):
        pass

    x, weight, bias = tensors()
    with torch.no_grad():
        assert ONEDNN not in operators(lambda: linear(x, nn.Parameter(weight.as_subclass(Quantized)), bias))


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation: got 'relu', expected 'gelu'"):
        linear(*tensors(), "relu")
