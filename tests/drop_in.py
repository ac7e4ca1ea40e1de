"""A fused module in the place of the one that it came from: results, gradients, state and the way back."""

import copy

import torch
from torch import nn

import tokenfusion
from tests.crossvit import fused_copy
from tests.parity import assert_parity, assert_runs

FORWARD, BACKWARD = "single_query_attention_cpu", "single_query_attention_backward_cpu"


def outputs_and_gradients(module: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the inputs and of every parameter that has one."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    module.zero_grad()
    out = module(*inputs)
    generator = torch.Generator().manual_seed(1)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
    parameters = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"out": out.detach()} | {f"input {i}": x.grad for i, x in enumerate(inputs)} | parameters


def check_parity(fused: nn.Module, plain: nn.Module, *inputs: torch.Tensor) -> None:
    """fused, on the C++ kernels, against plain, both against plain in float64."""
    exact = outputs_and_gradients(copy.deepcopy(plain).double(), *(x.double() for x in inputs))
    with assert_runs(FORWARD, BACKWARD):
        actual = outputs_and_gradients(fused, *inputs)
    unfused = outputs_and_gradients(plain, *inputs)
    assert set(actual) == set(unfused) == set(exact)
    largest = max(tensor.abs().max() for tensor in exact.values())
    for name in exact:
        if exact[name].abs().max() < 1e-12 * largest:  # zero but for rounding, as that of a key bias, has no direction
            assert actual[name].abs().max() <= 2 * unfused[name].abs().max(), name
        else:
            assert_parity(actual[name], unfused[name], exact[name], name=name)


def check_drop_in(plain: nn.Module, *inputs: torch.Tensor) -> None:
    """plain, fused: the same state, parity, and unfused the same bits again."""
    fused = fused_copy(plain)
    assert {type(module) for module in fused.modules()} != {type(module) for module in plain.modules()}
    for (key, value), (other_key, other) in zip(plain.state_dict().items(), fused.state_dict().items(), strict=True):
        assert key == other_key and torch.equal(value, other)
    before = copy.deepcopy(plain)
    check_parity(fused, copy.deepcopy(plain), *inputs)
    tokenfusion.unfuse(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in before.modules()]
    with assert_runs(), torch.no_grad():
        assert torch.equal(fused(*inputs), before(*inputs))
