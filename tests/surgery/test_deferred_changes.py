"""What a fused up-convolution was called with is changed before its result is used: an error, never a wrong number."""

import pytest
import torch
import torch.nn.functional as F

import tokenfusion
from tests.deferred import check, fused_copy, inputs, upconv
from tests.surgery.test_deferred import cat

pytestmark = pytest.mark.usefixtures("within_a_model")

CHANGES = {
    "input": lambda up, x: x.detach().mul_(2),
    "input without recording": lambda up, x: torch.no_grad()(x.add_)(1),
    "input given other memory": lambda up, x: setattr(x, "data", x.detach().clone()),
    "weight": lambda up, x: up.weight.detach().zero_(),
    "bias": lambda up, x: up.bias.detach().add_(1),
    "optimizer": lambda up, x: torch.optim.SGD(up.parameters(), 0.1).step(),
    "averaged weight": lambda up, x: torch.no_grad()(up.weight.lerp_)(torch.zeros(6, 4, 2, 2), 0.5),
    "loaded state": lambda up, x: up.load_state_dict(upconv().state_dict()),
}
USES = {
    "cat": lambda y, skip: torch.cat((y, skip), 1),
    "padded": lambda y, skip: torch.cat((F.pad(y, (0, 0, 0, 0)), skip), 1),
    "sum": lambda y, skip: y.sum(),
    "C++": lambda y, skip: torch.ops.aten.mul(y, 2),
    "numpy": lambda y, skip: y.detach().numpy(),
    "print": lambda y, skip: str(y),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_change_before_the_use_is_an_error(change, use, mode):
    up, (x, skip) = fused_copy(upconv()), inputs()
    for parameter in up.parameters():
        parameter.grad = torch.ones_like(parameter)
    with mode():
        y = up(x)
        change(up, x)
        with pytest.raises(RuntimeError, match="changed in place after its call.*clone it.*tokenfusion.unfuse"):
            use(y, skip)
        use(up(x), skip)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_change_after_the_use_is_none_of_its_business(use):
    up, (x, skip) = fused_copy(upconv()), inputs()
    with torch.no_grad():
        expected = use(upconv()(x), skip)
        y = up(x)
        used = use(y, skip)
        x.zero_()
        up.weight.zero_()
    if isinstance(used, str):
        assert used == expected
    else:
        torch.testing.assert_close(used, expected)


def test_what_is_replaced_and_not_changed_is_no_error():
    def use(up, x, skip):
        weight = up.weight
        y = up(x)
        up.weight = torch.nn.Parameter(weight.detach() * 0)
        joined = torch.cat((y, skip), 1)
        up.weight = weight
        return joined

    check(use)


def test_a_change_before_the_backward_is_torch_s_error():
    up, (x, skip) = fused_copy(upconv()), inputs()
    joined = cat(up, x * 1, skip)
    torch.no_grad()(up.weight.zero_)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        joined.sum().backward()


def test_unfused_in_between():
    up, (x, skip) = fused_copy(upconv()), inputs()
    y = up(x)
    tokenfusion.unfuse(up)
    torch.testing.assert_close(torch.cat((y, skip), 1), cat(up, x, skip))


def test_the_memory_of_a_result_and_of_its_padding_are_two():
    y = fused_copy(upconv())(inputs()[0])
    padded = F.pad(y, (0, 0, 0, 0))
    assert y.data_ptr() != padded.data_ptr() and torch.equal(y, padded)
