"""The linear layer with its bias and activation, in one pass over the output where that is faster."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from tokenfusion.kernels import dispatch
from tokenfusion.kernels.choices import Workloads
from tokenfusion.kernels.dispatch import Implementation, register
from tokenfusion.kernels.widened import FEWEST_ROWS, is_widened

_MIN_ROWS = 128  # below, oneDNN spends more on its set-up than it saves
_ROWS_TOGETHER = 512  # that are widened; more would leave the cache
_DTYPES = (torch.float32, torch.bfloat16)
_PLAIN = (torch.Tensor, nn.Parameter)  # no quantized or distributed weights


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
            and tensor.layout is torch.strided
            and not torch._C._functorch.is_legacy_batchedtensor(tensor)  # autograd's is_grads_batched
            for tensor in tensors
        )
        and dispatch.get_backend() in ("auto", "cpu")
    )


def _run_onednn(x, weight, bias, activation):
    algorithm = ("none", [], "") if activation is None else (activation, [], "none")
    bias = None if bias is None else bias.contiguous()  # whatever its strides, it is read as contiguous
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *algorithm)


def _run_widened(x, weight, bias, activation):
    weight, bias = weight.float(), None if bias is None else bias.float()
    rows = x.flatten(0, -2)
    out = x.new_empty(rows.shape[0], weight.shape[0])
    for part, of_part in zip(rows.split(_ROWS_TOGETHER), out.split(_ROWS_TOGETHER), strict=True):
        of_part.copy_(F.linear(part.float(), weight, bias))
    if activation is not None:  # of what was rounded: float16 may have overflowed
        torch.ops.aten.gelu_(out)
    return out.unflatten(0, x.shape[:-1])


def _run_cpu(x, weight, bias, activation):
    return (_run_widened if is_widened(x.dtype) else _run_onednn)(x, weight, bias, activation)


def _run_reference(x, weight, bias, activation):
    out = F.linear(x, weight, bias)
    if activation is None:
        return out
    return F.gelu(out) if torch.is_grad_enabled() else torch.ops.aten.gelu_(out)


def _cpu_can_run(x, weight, bias, activation) -> str | None:
    parameters = (weight,) if bias is None else (weight, bias)
    if not kernels_may_run(x, *parameters):
        return "a gradient may be recorded, the call is compiled or recorded, or its tensors are not plain ones"
    if any(parameter.dtype != x.dtype for parameter in parameters):
        return "x and the parameters have different dtypes"
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return "its sizes do not match"
    fewest = FEWEST_ROWS if is_widened(x.dtype) else _MIN_ROWS
    if not x.numel() >= fewest * x.shape[-1] > 0:
        return f"of less than {fewest} rows PyTorch's product is faster"
    if torch.is_autocast_enabled("cpu"):
        return "autocast chooses the dtype"
    if torch._C._len_torch_dispatch_stack():  # FlopCounterMode, for one, knows PyTorch's own product alone
        return "a dispatch mode looks at the call"
    return None if is_widened(x.dtype) else _why_not_onednn(x, weight)


def _why_not_onednn(x, weight) -> str | None:
    if x.dtype not in _DTYPES:
        return f"oneDNN's product takes float32 or bfloat16, and x is {x.dtype}"
    if _overlaps(weight):
        return "rows and columns of the weight share memory, which oneDNN refuses"
    if not (torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()):
        return "there is no oneDNN"
    return None


def _overlaps(matrix: torch.Tensor) -> bool:
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    return row < columns * column and column < rows * row


def _workload_of(x, weight, bias, activation):
    rows = math.prod(x.shape[:-1])
    return (() if activation is None else (activation,)), (rows, x.shape[-1], weight.shape[0])


def _example(words, sizes, make):
    rows, channels, features = sizes
    weight, bias = make(features, channels, scale=channels**-0.5), make(features)
    return make(rows, channels), weight, bias, words[0] if words else None


OPERATOR = register(
    "linear",
    Implementation("cpu", _run_cpu, _cpu_can_run),
    Implementation("reference", _run_reference, lambda x, weight, bias, activation: None),
    supporting=True,
    workloads=Workloads(("rows", "C", "F"), None, _workload_of, _example),
)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str | None = None
) -> torch.Tensor:
    """activation(x W^T + b).

    In inference on a CPU oneDNN adds the bias and applies the activation to each tile of the product while it is in
    cache. PyTorch's own product first fills the output with the bias, and the activation is one more pass over it; it
    is the faster one where its library serves the make of the processor well, which `tokenfusion tune` finds out.
    Half precision that the processor has no instructions for is computed in float32. Elsewhere, and under the reference
    backend, this is F.linear and F.gelu.

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
    call = x, weight, bias, activation
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _run_reference(*call)
    return OPERATOR.select(*call).run(*call)
