"""A fused module in the place of the one that it came from: results, gradients, state and the way back."""

import copy

import torch
from torch import nn

import tokenfusion
from tests.crossvit import fused_copy
from tests.parity import assert_parity, assert_runs, longest_sum

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


def terms_of_biases(module: nn.Module) -> dict[str, torch.Tensor]:
    """Filled in the backward: what the gradient of each linear layer's bias is the sum of, over the first dimension."""
    terms = {}

    def watch(out: torch.Tensor, name: str) -> None:
        out.register_hook(lambda grad: terms.update({name: grad.flatten(0, -2)}))

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _layer, _inputs, out, name=f"{name}.bias": watch(out, name))
    return terms


def check_parity(
    fused: nn.Module, plain: nn.Module, *inputs: torch.Tensor, runs: tuple[str, ...] = (FORWARD, BACKWARD)
) -> None:
    """fused, on these C++ kernels, against plain, both against plain in float64."""
    exactly = copy.deepcopy(plain).double()
    terms = terms_of_biases(exactly)
    exact = outputs_and_gradients(exactly, *(x.double() for x in inputs))
    with assert_runs(*runs):
        actual = outputs_and_gradients(fused, *inputs)
    unfused = outputs_and_gradients(plain, *inputs)
    assert set(actual) == set(unfused) == set(exact)
    longest = longest_sum(plain)
    for name in exact:
        sums = {"summands": longest}
        if name in terms:  # a key's bias has a gradient of zero, but for the rounding of its terms
            sums = {"summands": len(terms[name]), "scale": terms[name].norm(dim=0)}
        assert_parity(actual[name], unfused[name], exact[name], name, **sums)


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
