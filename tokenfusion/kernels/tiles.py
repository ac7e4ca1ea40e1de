"""When kernels by the tiles of AMX may take a call in inference."""

import torch

from tokenfusion.kernels import extension
from tokenfusion.kernels.linear import kernels_may_run


def why_not_tiles(*tensors: torch.Tensor) -> str | None:
    """None where nothing but eager PyTorch looks at a call of these tensors, all of them bfloat16, and AMX is there."""
    if not kernels_may_run(*tensors):
        return "a gradient may be recorded, the call is compiled or recorded, or its tensors are not plain ones"
    if any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        return "the tiles of AMX multiply bfloat16, and not all tensors are of it"
    if not extension.amx_allowed():
        return extension.why_not() or "this processor has no AMX, or it is switched off"
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return "autocast chooses the dtype"
    if torch._C._len_torch_dispatch_stack():  # FlopCounterMode, for one, knows PyTorch's own functions alone
        return "a dispatch mode looks at the call"
    return None
