"""Calls in inference that a kernel leaves to PyTorch, for tests of where it runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    """Sees every operator, and changes none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def without_gradient(function: Callable) -> Callable:
    def call(*tensors):
        with torch.no_grad():
            return function(*tensors)

    return call


def within(context: Callable[[], AbstractContextManager], function: Callable) -> Callable:
    def call(*tensors):
        with torch.no_grad(), context():
            return function(*tensors)

    return call
