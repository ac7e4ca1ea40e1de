"""Tied layers beside untied ones of the same values."""

import torch


def with_gradients(module, x, parameters):
    x = x.detach().requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y, torch.autograd.grad((y * weights).sum(), (x, *parameters))


def copy_values(pairs) -> None:
    with torch.no_grad():
        for parameter, value in pairs:
            parameter.copy_(value)
