"""torch.utils.flop_counter counts the products of every operator."""

from math import prod

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tokenfusion
from tests.parity import assert_runs
from tests.public import LAYERS, OPERATORS, layer
from tokenfusion.kernels import extension, gated_sum, tied_ffn, upconv_concat
from tokenfusion.kernels.linear import linear

needs_kernel = pytest.mark.skipif(
    torch.float32 not in extension.own_product_dtypes(), reason="gated_sum has no kernel for this processor"
)


def flops(call, *tensors) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*tensors)
    return counter.get_total_flops()


def flops_trained(call, tensors, frozen=()) -> int:
    leaves = [t.clone().requires_grad_(i not in frozen) for i, t in enumerate(tensors)]
    return flops(lambda: call(*leaves).sum().backward())


def product(*sizes: int) -> int:
    return 2 * prod(sizes)


# Products that a kernel computes again in its backward pass, and the reference holds.
AGAIN = {
    "single_query_attention": product(2, 3, 8, 5 + 1),
    "single_query_attention, lengths": product(2, 3, 8, 5 + 1),
    "dynamic_mixing": product(2, 3, 2, 16, 4 * 2),
    "tied_ffn": product(3, 8, 4),
    "upconv_concat_project": product(2 * 2 * 2, 2 * 3 * 2 * 2),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_counts_as_its_definition(name):
    call, tensors = OPERATORS[name]
    with tokenfusion.backend("reference"):
        forward, both = flops(call, *tensors), flops_trained(call, tensors)
    assert forward > 0
    assert flops(call, *tensors) == forward
    assert flops_trained(call, tensors) == both + AGAIN.get(name, 0)
    with torch.no_grad():
        assert flops(call, *tensors) == forward


@pytest.mark.parametrize("name", sorted(OPERATORS.keys() - {"upconv_concat_project", "gated_sum"}))
def test_a_frozen_input_saves_its_products(name):
    call, tensors = OPERATORS[name]

    def saved():
        """By each of the tensors that have products of their own."""
        return [flops_trained(call, tensors) - flops_trained(call, tensors, {i}) for i in range(2)]

    with tokenfusion.backend("reference"):
        expected = saved()
    assert any(expected)
    assert saved() == expected


def test_a_held_hidden_layer_is_not_computed_again():
    _, tensors = OPERATORS["tied_ffn"]
    with tokenfusion.backend("reference"):
        expected = flops_trained(tied_ffn, tensors)
    assert flops_trained(lambda *t: tied_ffn(*t, recompute=False), tensors) == expected


def test_a_result_that_is_written_to():
    _, tensors = OPERATORS["upconv_concat"]
    out = upconv_concat(*tensors)
    with torch.no_grad():
        assert flops(lambda: upconv_concat(*tensors, out=out)) == flops(upconv_concat, *tensors)


@needs_kernel
def test_gated_sum():
    call, tensors = OPERATORS["gated_sum"]
    tensors = [tensor.float() for tensor in tensors]
    part, other_part, weight, other_weight, bias, gates = tensors
    out, projection = part.new_empty(2, 5, 4), torch.randn(4, 4)

    def project():
        layers = [part, other_part], [weight, other_weight], [bias, None]
        gated_sum(*layers, gates, projection, bias, out=out)

    with torch.no_grad():
        with assert_runs("gated_sum_out_cpu"):
            call(*tensors)
        assert flops(call, *tensors) == 2 * product(2, 5, 6, 4)
        assert flops(project) == 2 * product(2, 5, 6, 4) + product(2, 5, 4, 4)


@needs_kernel
def test_gated_sum_backward():
    part, weight = torch.randn(2, 3, 256, requires_grad=True), torch.randn(256, 256, requires_grad=True)
    out = gated_sum([part], [weight], [None], torch.rand(2, 1, 256))
    with assert_runs("gated_sum_backward_cpu"):
        out.sum().backward(retain_graph=True)
    assert flops(lambda: out.sum().backward()) == 2 * product(2, 3, 256, 256)


def test_a_linear_layer_in_inference():
    x, weight, bias = torch.randn(200, 40), torch.randn(56, 40), torch.randn(56)
    with torch.no_grad():
        assert flops(linear, x, weight, bias, "gelu") == product(200, 40, 56)


@pytest.mark.skipif(not extension.amx_allowed(), reason="no AMX here")
def test_attention_in_inference():
    q, k = torch.randn(2, 3, 50, 32).bfloat16(), torch.randn(2, 3, 70, 32).bfloat16()
    with torch.no_grad():
        assert flops(torch.ops.tokenfusion.attention_cpu, q, k, k, 0.1) == 2 * product(2, 3, 50, 70, 32)


@pytest.mark.skipif(not extension.amx_allowed(), reason="no AMX here")
def test_an_mlp_in_inference():
    x, weight_in, weight_out = (torch.randn(size).bfloat16() for size in ((2, 30, 40), (56, 40), (24, 56)))
    with torch.no_grad():
        counted = flops(torch.ops.tokenfusion.mlp_cpu, x, weight_in, None, weight_out, None)
    assert counted == product(60, 40, 56) + product(60, 56, 24)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_counts_as_with_the_reference(name):
    module, inputs = layer(name)
    with tokenfusion.backend("reference"):
        expected = flops(module, *inputs)
    assert flops(module, *inputs) == expected
