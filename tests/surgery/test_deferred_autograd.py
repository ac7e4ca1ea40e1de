"""The result of a fused up-convolution in autograd: modes, hooks, checkpoints, functions of one's own, derivatives."""

import contextlib

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge, save_on_cpu
from torch.utils.checkpoint import checkpoint

from tests.deferred import check, fused_copy, inputs, outcome, upconv
from tests.parity import assert_runs

pytestmark = pytest.mark.usefixtures("within_a_model")

MODES = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
}


def around(outer, call, join):
    def use(up, x, skip):
        with MODES[outer]():
            with MODES[call]():
                y = up(x)
            with MODES[join]():
                skip = skip.to(y.dtype)
                return torch.cat((skip, y), 1) * 1, y

    return use


@pytest.mark.parametrize("outer", ["nothing", "no_grad", "inference_mode", "autocast"])
@pytest.mark.parametrize("call", MODES)
@pytest.mark.parametrize("join", MODES)
def test_modes_of_the_call_and_of_the_use(outer, call, join):
    use, (x, skip) = around(outer, call, join), inputs()
    results = []
    for up in (upconv(), fused_copy(upconv())):
        try:
            results.append(outcome(use, up, x, skip))
        except RuntimeError as error:  # inference tensors in what autograd records
            results.append(str(error))
    expected, actual = results
    if isinstance(expected, str):
        assert actual == expected
    else:
        low = any(value.dtype is torch.bfloat16 for value in expected.values())
        check(use, x, skip, runs=None, tolerance=2e-2 if low else 1e-5)


@pytest.mark.parametrize("mode", ["nothing", "no_grad", "inference_mode", "autocast"])
def test_one_mode_around_both_runs_as_one_operator(mode):
    check(around(mode, "nothing", "nothing"), tolerance=2e-2 if mode == "autocast" else 1e-5)


def test_an_autocast_dtype_without_a_kernel():
    def use(up, x, skip):
        with torch.autocast("cpu", torch.float16):
            return torch.cat((up(x), skip.half()), 1).float()

    check(use, runs=False, tolerance=2e-3)


def test_inference_tensors_as_inputs():
    up, (x, skip) = upconv(), inputs()
    fused = fused_copy(up)
    plain = x.detach()
    for laid_out in (plain, plain.repeat(1, 2, 1, 1)[:, ::2], plain.to(memory_format=torch.channels_last)):
        with torch.inference_mode():
            x, skip = laid_out * 1, skip * 1
            with assert_runs("upconv_concat_cpu"):
                y = fused(x)
                joined = torch.cat((y, skip), 1)
            expected = torch.cat((up(x), skip), 1)
            y = fused(x)
            x.zero_()
        torch.testing.assert_close(joined, expected, check_stride=True)
        torch.testing.assert_close(y.clone(), expected[:, :4])  # as before the change
        with torch.no_grad():
            torch.testing.assert_close(torch.cat((fused(x), skip), 1), torch.cat((up(x), skip), 1))


def test_grad_within_inference_mode():
    def use(up, x, skip):
        with torch.inference_mode(), torch.inference_mode(False):
            return torch.cat((up(x), skip), 1)

    check(use)


def checkpointed(use, reentrant):
    return lambda up, x, skip: checkpoint(use, up, x, skip, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("result", ["joined", "alone", "both"])
def test_checkpoints(reentrant, result):
    def use(up, x, skip):
        y = up(x)
        joined = torch.cat((y, skip), 1)
        return {"joined": joined, "alone": y, "both": (joined, y)}[result]

    check(checkpointed(use, reentrant), runs=None)

    def joined_outside(up, x, skip):
        y = checkpoint(lambda x: up(x), x, use_reentrant=reentrant)
        return torch.cat((y, skip), 1), y * 2

    check(joined_outside, runs=None)


def test_saved_tensors_on_another_device():
    def use(up, x, skip):
        with save_on_cpu():
            return torch.cat((up(x), skip), 1)

    check(use)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad * 2


BEFORE = {
    "nothing": lambda y: None,
    "asked": lambda y: y.sum(),
    "changed": lambda y: y.mul_(3).add_(1),
    "changed unseen": lambda y: torch.no_grad()(y.mul_)(3),
    "changed through a view and asked": lambda y: (y[:, 1:].mul_(3), y.sum()),
    "changed by a function": lambda y: torch.nn.functional.dropout(y, 0.5, inplace=True),
}


@pytest.mark.parametrize("function", [Doubled, Same, InPlace, Kept])
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_functions_of_ones_own(function, before):
    def use(up, x, skip):
        y = up(x)
        before(y)
        y = function.apply(y)
        return torch.cat((y, skip), 1), y * 3

    check(use, runs=None)


def hooked(up, x, skip, when, what):
    """Uses y three times and hooks it at one moment; returns what the hook saw, and the result."""
    y, seen = up(x), []

    def add():
        if what == "retain_grad":
            y.retain_grad()
        elif what == "hook":
            y.register_hook(lambda grad: seen.append(grad) or grad * 2)
        elif what == "hook of the node":
            y.grad_fn.register_prehook(lambda grads: (grads[0] * 2,))

    steps = [lambda: torch.cat((y, skip), 1), lambda: y * 2, lambda: torch.cat((skip, y), 1)]
    results = []
    for i, step in enumerate(steps):
        if i == when:
            add()
        results.append(step())
    if when == 3:
        add()
    sum(result.square().sum() for result in results).backward()
    return *(result.detach() for result in results), *seen, *([y.grad] if y.retains_grad else [])


@pytest.mark.parametrize("when", range(4))
@pytest.mark.parametrize("what", ["retain_grad", "hook", "hook of the node"])
def test_hooks_see_every_use(when, what):
    check(lambda up, x, skip: hooked(up, x, skip, when, what), runs=None)


@pytest.mark.parametrize("edge", [False, True])
@pytest.mark.parametrize("asked", ["before", "after", "never"])
def test_the_gradient_of_the_result(edge, asked):
    def use(up, x, skip):
        y = up(x)
        if asked == "before":
            y.sum()
        joined = torch.cat((y, skip), 1)
        if asked == "after":
            y.sum()
        at = get_gradient_edge(y) if edge else y
        first, second = torch.autograd.grad(joined.pow(3).sum(), [at, skip], create_graph=True)
        (keyword,) = torch.autograd.grad(outputs=joined, inputs=at, grad_outputs=torch.ones_like(joined))
        return first, second, keyword

    check(use, tolerance=1e-4, runs=asked != "before")


@pytest.mark.parametrize("form", [list, lambda inputs: inputs[0]], ids=["several", "one"])
@pytest.mark.parametrize("asked", ["before", "after", "never"])
@pytest.mark.parametrize("function", [False, True], ids=["method", "function"])
def test_backward_into_the_result(form, asked, function):
    def use(up, x, skip):
        y = up(x)
        if asked == "before":
            y.sum()
        loss = torch.cat((y, skip), 1).pow(3).sum()
        if asked == "after":
            y.sum()
        into = form([y, skip])
        for _ in range(2):
            if function:
                torch.autograd.backward([loss], retain_graph=True, inputs=into)
            else:
                loss.backward(retain_graph=True, inputs=into)
        assert up.weight.grad is None and (skip.grad is None) == (into is y)
        return y.grad

    check(use, tolerance=1e-4, runs=asked != "before")


def test_backward_from_the_result_and_into_it():
    def use(up, x, skip):
        y = up(x)
        y.backward(torch.ones(2, 4, 6, 10), inputs=y)
        assert up.weight.grad is None
        changed = up(x)
        changed.mul_(2)
        changed.square().sum().backward(inputs=[changed])
        return y.grad, changed.grad

    check(use, runs=False)


def test_the_gradient_of_a_changed_result():
    def use(up, x, skip):
        y = up(x)
        y.mul_(2)
        return torch.autograd.grad(y.pow(2).sum(), [y, x])

    check(use, runs=False)


def test_backward_from_the_result():
    def use(up, x, skip):
        y = up(x)
        y.backward(torch.ones(2, 4, 6, 10))
        torch.autograd.backward([up(x)], [y.detach()])
        return y.detach()

    check(use, runs=False)


def test_a_result_without_history_made_to_require_a_gradient():
    def use(up, x, skip):
        with torch.no_grad():
            y, z = up(x), up(x)
            y.requires_grad_()
            z.requires_grad = True
        torch.cat((y * z, skip), 1).square().sum().backward()
        Doubled.apply(y).sum().backward()
        return y.grad, z.grad, y.detach()

    check(use, runs=False)


@pytest.mark.parametrize("place", ["up", "parent", "pre", "full backward", "all modules"])
def test_hooks_on_modules(place):
    def use(model, x, skip):
        seen, up = [], model[0]
        keep = lambda _module, _inputs, out: seen.append(out * 2)  # noqa: E731
        handles = {
            "up": lambda: up.register_forward_hook(keep),
            "parent": lambda: model.register_forward_hook(keep),
            "pre": lambda: up.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,)),
            "full backward": lambda: up.register_full_backward_hook(lambda _m, into, _out: (into[0] * 2,)),
            "all modules": lambda: nn.modules.module.register_module_forward_hook(keep),
        }
        handle = handles[place]()
        joined = torch.cat((model(x), skip), 1)
        handle.remove()
        return joined, *seen

    check(use, *inputs(), up=nn.Sequential(upconv()), runs=None)


def test_second_derivatives():
    def use(up, x, skip):
        y = up(x)
        joined = torch.cat((y, skip), 1)
        grads = torch.autograd.grad((joined.pow(3).sum() + y.pow(3).sum()), [x, up.weight, skip], create_graph=True)
        return tuple(grad * 1 for grad in grads)

    x, skip = inputs()
    check(use, x.detach().double().requires_grad_(), skip.detach().double().requires_grad_(), up=upconv().double())


def test_gradcheck():
    fused = fused_copy(nn.ConvTranspose2d(2, 2, 2, 2).double())
    x, skip = torch.randn(1, 2, 2, 1).double().requires_grad_(), torch.randn(1, 1, 4, 2).double().requires_grad_()

    def use(x, skip, weight):
        y = fused(x)
        return torch.cat((y, skip), 1), y

    fused.weight.requires_grad_()
    assert torch.autograd.gradcheck(use, (x, skip, fused.weight))
    assert torch.autograd.gradgradcheck(use, (x, skip, fused.weight))


def test_batched_gradients():
    def use(up, x, skip):
        joined = torch.cat((up(x), skip), 1)
        directions = torch.ones(3, *joined.shape) * torch.arange(3.0)[:, None, None, None, None]
        return torch.autograd.grad(joined, [x, skip], directions, is_grads_batched=True)

    check(use)


def test_function_transforms():
    def use(up, x, skip):
        y = up(x)
        mapped = torch.vmap(lambda s: torch.cat((y, s), 1))(torch.stack((skip, skip * 2)))
        tangent = torch.func.jvp(lambda s: torch.cat((up(x), s), 1) * y.mean(), (skip,), (skip,))
        grad = torch.func.grad(lambda s: torch.cat((up(s), skip), 1).square().sum())(x)
        return mapped, *tangent, grad

    check(use, runs=False)


def test_a_result_changed_in_place_stays_the_same_object():
    y = fused_copy(upconv())(inputs()[0])
    assert y.mul_(2) is y and torch.relu_(y) is y and y.grad_fn.name() == "ReluBackward0"


def test_a_function_of_a_result_changed_through_a_view_is_an_error():
    y = fused_copy(upconv())(inputs()[0])
    y[:, 1:].mul_(3)
    with pytest.raises(RuntimeError, match="through a view.*give it a clone"):
        Doubled.apply(y)
    with torch.no_grad():
        Doubled.apply(y.clone())
