"""The linear layer with its bias and activation, in one pass over the output where that is faster."""

import torch
from torch import nn
from torch.nn import functional as F

from tokenfusion.kernels import dispatch

_MIN_ROWS = 128  # below, oneDNN spends more on its set-up than it saves
_DTYPES = (torch.float32, torch.bfloat16)
_PLAIN = (torch.Tensor, nn.Parameter)  # no quantized or distributed weights


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """activation(x W^T + b).

    In inference on a CPU oneDNN adds the bias and applies the activation to each tile of the product while it is in
    cache. PyTorch's own product first fills the output with the bias, and the activation is one more pass over it.
    Elsewhere, and under the reference backend, this is F.linear and F.gelu.

    Args:
        x: [..., C], floating point.
        weight: [F, C], any strides; bias: [F] or None; both in the dtype of x, unless autocast is on.
        activation: "gelu" (exact, with erf) or None.

    Returns:
        [..., F], a new tensor.

    Raises:
        ValueError: another activation.
    """
    if activation not in (None, "gelu"):
        raise ValueError(f"activation: got {activation!r}, expected 'gelu' or None")
    if _onednn_serves(x, weight, bias):
        algorithm = ("none", [], "") if activation is None else ("gelu", [], "none")
        bias = None if bias is None else bias.contiguous()  # whatever its strides, it is read as contiguous
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *algorithm)
    out = F.linear(x, weight, bias)
    if activation is None:
        return out
    return F.gelu(out) if torch.is_grad_enabled() else torch.ops.aten.gelu_(out)


def kernels_may_run(*tensors: torch.Tensor) -> bool:
    """Whether operators that nothing but eager PyTorch knows may take these tensors: on a CPU, with no gradient."""
    return not torch.is_grad_enabled() and is_plain_call(*tensors)


def is_plain_call(*tensors: torch.Tensor) -> bool:
    """Whether nothing but eager PyTorch, and autograd, looks at a call of these tensors on a CPU."""
    return (
        not torch.compiler.is_compiling()  # the compiler makes its own choice, with knowledge of what surrounds it
        and dispatch.transform() is None
        and all(
            type(tensor) in _PLAIN
            and tensor.device.type == "cpu"
            and not torch._C._functorch.is_legacy_batchedtensor(tensor)  # autograd's is_grads_batched
            for tensor in tensors
        )
        and dispatch.get_backend() in ("auto", "cpu")
    )


def _onednn_serves(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    parameters = (weight,) if bias is None else (weight, bias)
    return (
        kernels_may_run(x, *parameters)
        and x.dtype in _DTYPES
        and all(parameter.dtype == x.dtype for parameter in parameters)
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and x.numel() >= _MIN_ROWS * x.shape[-1] > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()  # FlopCounterMode, for one, knows PyTorch's own product alone
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
        and (x.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
