"""Triton kernels: can they run here, on an NVIDIA GPU or in the interpreter on a CPU, and how they are registered."""

import functools
import importlib
import importlib.util
import os

import torch

from tokenfusion.kernels import triton_interpreter
from tokenfusion.kernels.library import LIBRARY

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def why_not() -> str | None:
    """None when Triton kernels can run on this machine, otherwise the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRET:
        return None
    if not torch.cuda.is_available():
        return "no CUDA device is available (TRITON_INTERPRET=1 runs the kernels on a CPU, for tests)"
    return None


def why_not_tensor(tensor: torch.Tensor) -> str | None:
    """None when Triton kernels can take this tensor, otherwise the reason."""
    reason = why_not()
    if reason is not None:
        return reason
    expected = "cpu" if INTERPRET else "cuda"
    if tensor.device.type != expected:
        return f"tensors are on {tensor.device.type}, expected {expected}"
    return None


def implement(package: str, operator: str, *others: str) -> None:
    """Have tokenfusion::<operator>_triton and <operator>_backward_triton run run_forward and run_backward of its host.

    The host, <package>.triton_host, is imported by the first call: it needs Triton. For each name in others,
    <operator>_<name>_triton runs its run_<name>.
    """
    host = f"{package}.triton_host"

    def run(function: str, *args):
        if INTERPRET:
            triton_interpreter.mend()
        return getattr(importlib.import_module(host), function)(*args)

    for name in ("forward", "backward", *others):
        part = "" if name == "forward" else f"_{name}"
        LIBRARY.impl(f"{operator}{part}_triton", functools.partial(run, f"run_{name}"), "CPU" if INTERPRET else "CUDA")
