"""The two linear layers of a transformer's MLP, with the hidden layer in the cache alone where AMX allows it."""

import math

import torch

from tokenfusion.kernels.choices import Workloads
from tokenfusion.kernels.dispatch import Implementation, register
from tokenfusion.kernels.library import define_without_gradient
from tokenfusion.kernels.linear import linear
from tokenfusion.kernels.tiles import why_not_tiles

_LEAST_ROWS = 128  # of fewer, packing the weights takes longer than the products


def _flops(x, weight_in, bias_in, weight_out, *_) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(weight_in) + math.prod(weight_out))


def _fake(x, weight_in, bias_in, weight_out, bias_out):
    return x.new_empty(*x.shape[:-1], weight_out.shape[0])


_run_kernel = define_without_gradient(
    "mlp_cpu",
    "(Tensor x, Tensor weight_in, Tensor? bias_in, Tensor weight_out, Tensor? bias_out) -> Tensor",
    fake=_fake,
    flops=_flops,
)


def _run_reference(x, weight_in, bias_in, weight_out, bias_out):
    return linear(linear(x, weight_in, bias_in, "gelu"), weight_out, bias_out)


def _kernel_can_run(x, weight_in, bias_in, weight_out, bias_out) -> str | None:
    reason = why_not_tiles(*(tensor for tensor in (x, weight_in, bias_in, weight_out, bias_out) if tensor is not None))
    if reason is not None:
        return reason
    if not (
        weight_in.dim() == weight_out.dim() == 2
        and x.shape[-1] == weight_in.shape[1]
        and weight_out.shape[1] == weight_in.shape[0]
        and (bias_in is None or bias_in.shape == weight_in.shape[:1])
        and (bias_out is None or bias_out.shape == weight_out.shape[:1])
    ):
        return "its sizes do not match"
    if not x.numel() >= _LEAST_ROWS * x.shape[-1] > 0:
        return f"of less than {_LEAST_ROWS} rows single products are faster"
    return None


def _workload_of(x, weight_in, bias_in, weight_out, bias_out):
    return (), (math.prod(x.shape[:-1]), x.shape[-1], *weight_out.shape[::-1])


def _example(words, sizes, make):
    rows, channels, features, outputs = sizes
    weight_in, weight_out = (
        make(features, channels, scale=channels**-0.5),
        make(outputs, features, scale=features**-0.5),
    )
    return make(rows, channels), weight_in, make(features), weight_out, make(outputs)


OPERATOR = register(
    "mlp",
    Implementation("cpu", _run_kernel, _kernel_can_run),
    Implementation("reference", _run_reference, lambda *call: None),
    supporting=True,
    workloads=Workloads(("rows", "C", "F", "Cout"), None, _workload_of, _example),
)


def mlp(
    x: torch.Tensor,
    weight_in: torch.Tensor,
    bias_in: torch.Tensor | None,
    weight_out: torch.Tensor,
    bias_out: torch.Tensor | None,
) -> torch.Tensor:
    """gelu(x W_in^T + b_in) W_out^T + b_out.

    In inference in bfloat16 on a CPU with AMX a kernel takes a block of rows through both layers, so that the hidden
    layer never leaves the core's cache; it is rounded to bfloat16 once, after GELU, and sums are float32. Elsewhere,
    and under the reference backend, these are two calls of `linear`.

    Args:
        x: [..., C], floating point.
        weight_in: [F, C]; bias_in: [F] or None; weight_out: [Cout, F]; bias_out: [Cout] or None; any strides.

    Returns:
        [..., Cout], a new tensor.
    """
    call = x, weight_in, bias_in, weight_out, bias_out
    if x.dtype != torch.bfloat16 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _run_reference(*call)
    return OPERATOR.select(*call).run(*call)
