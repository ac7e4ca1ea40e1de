"""Modes of PyTorch's, in which somebody may look at calls or change them."""

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_COUNTER = "torch.utils.flop_counter"  # its mode has no public name


def functions_are_seen() -> bool:
    """By a TorchFunctionMode, but for torch.device, which places new tensors."""
    return torch._C._len_torch_function_stack() > 0 and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )


def operators_are_seen() -> bool:
    """By a TorchDispatchMode that is none of PyTorch's own tracing, nor its counter of operations, which knows ours."""
    return torch._C._len_torch_dispatch_stack() > 0 and any(
        not (mode.is_infra_mode() or type(mode).__module__ == _COUNTER) for mode in _get_current_dispatch_mode_stack()
    )
