"""Whether Triton kernels can run here: on an NVIDIA GPU, or in Triton's interpreter on a CPU."""

import functools
import importlib.util
import os

import torch

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
