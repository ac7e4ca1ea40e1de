"""The definition of tied_ffn against two linear layers with a matrix each."""

import pytest
import torch

from tests.gradients import in_float64
from tests.tied_ffn.cases import make_inputs
from tokenfusion.kernels.tied_ffn import reference


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_gradient_of_the_weight_is_the_sum_of_both_matrices_gradients(activation):
    x, weight, bias_in, bias_out, grad = in_float64(make_inputs(7, channels=6, features=10, dtype=torch.float64))
    first, second = torch.nn.Linear(6, 10).double(), torch.nn.Linear(10, 6).double()
    with torch.no_grad():
        first.weight.copy_(weight), first.bias.copy_(bias_in)
        second.weight.copy_(weight.t()), second.bias.copy_(bias_out)
    act = {"gelu": torch.nn.GELU(), "gelu_tanh": torch.nn.GELU("tanh"), "relu": torch.nn.ReLU()}
    act |= {"silu": torch.nn.SiLU(), "identity": torch.nn.Identity()}
    untied = second(act[activation](first(x)))
    y = reference.tied_ffn(x, weight, bias_in, bias_out, activation=activation)
    torch.testing.assert_close(y, untied)
    got = torch.autograd.grad(y, (weight, bias_in, bias_out, x), grad)
    parameters = first.weight, second.weight, first.bias, second.bias, x
    grad_first, grad_second, *others = torch.autograd.grad(untied, parameters, grad)
    torch.testing.assert_close(got[0], grad_first + grad_second.t())
    torch.testing.assert_close(got[1:], tuple(others))
