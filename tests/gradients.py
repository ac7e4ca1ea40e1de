"""An operator's gradients, and what holds of them whatever the operator."""

from collections.abc import Callable, Container

import torch

Tensors = tuple[torch.Tensor | None, ...]


def with_gradients(function: Callable, inputs: Tensors, **options) -> list[torch.Tensor]:
    """The result, and the gradients of those inputs that require one; the last input is the gradient of the result."""
    *tensors, grad = inputs
    trained = [t for t in tensors if t is not None and t.requires_grad]
    result = function(*tensors, **options)
    return [result, *torch.autograd.grad(result, trained, grad)]


def in_float64(inputs: Tensors) -> Tensors:
    return tuple(None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in inputs)


def check_frozen(function: Callable, inputs: Tensors, *frozen: Container[int], **options) -> None:
    """Where the inputs of these numbers require no gradient, those of the others stay what they are, bit for bit."""
    full = with_gradients(function, inputs, **options)[1:]
    for numbers in frozen:
        partly = tuple(t.detach() if i in numbers else t for i, t in enumerate(inputs))
        got = with_gradients(function, partly, **options)[1:]
        want = [grad for i, grad in enumerate(full) if i not in numbers]
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def check_repeats(function: Callable, inputs: Tensors, **options) -> None:
    """Fifty further calls give the same bits."""
    first = with_gradients(function, inputs, **options)
    for _ in range(50):
        again = with_gradients(function, inputs, **options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
