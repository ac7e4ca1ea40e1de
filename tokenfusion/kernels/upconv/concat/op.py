"""upconv_concat: argument checks, registration, autograd and the public function."""

import torch

from tokenfusion.kernels import triton_support
from tokenfusion.kernels.checks import autocast, check_floating, check_not_recorded, check_same
from tokenfusion.kernels.dispatch import Implementation, register
from tokenfusion.kernels.library import Form, define_differentiable, define_without_gradient, second_order
from tokenfusion.kernels.upconv import reference
from tokenfusion.kernels.upconv.arguments import (
    CPU_FORMS,
    TRITON_FORMS,
    check_upconv,
    cpu_can_run,
    cuda_can_run,
    triton_can_run,
)
from tokenfusion.kernels.upconv.concat import flops
from tokenfusion.kernels.upconv.concat.workloads import WORKLOADS
from tokenfusion.kernels.upconv.shapes import empty_gradient, empty_map, empty_sum, gives_channels_last

_TENSORS = "Tensor x, Tensor weight, Tensor? bias, Tensor? skip, bool skip_first"
_SCHEMA = f"({_TENSORS}, bool channels_last) -> Tensor"
_OUT_SCHEMA = f"({_TENSORS}, Tensor(a!) out) -> ()"
_BACKWARD_SCHEMA = (
    "(Tensor grad_up, Tensor x, Tensor weight, bool[3] needed) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)


def _fake(x, weight, bias, skip, skip_first, channels_last):
    return empty_map(x, weight, weight.shape[1] + (0 if skip is None else skip.shape[1]), channels_last)


def _fake_backward(grad_up, x, weight, needed):
    return (
        empty_gradient(x, needed[0]),
        torch.empty_like(weight) if needed[1] else weight.new_empty(0),
        empty_sum(x, weight.shape[1], needed[2]),
    )


def _save(ctx, inputs, output):
    x, weight, _, skip, skip_first, _ = inputs
    up_channels, skip_channels = weight.shape[1], 0 if skip is None else skip.shape[1]
    ctx.up = (skip_channels if skip_first else 0, up_channels)
    ctx.skip = (0 if skip_first else up_channels, skip_channels)
    ctx.save_for_backward(x, weight)


def _gradients(ctx, run_backward, grad_out):
    *needed, needs_skip = ctx.needs_input_grad[:4]
    grads = (None, None, None)
    if any(needed):
        grads = run_backward(grad_out.narrow(1, *ctx.up), *ctx.saved_tensors, needed)
    return *grads, grad_out.narrow(1, *ctx.skip) if needs_skip else None


def _save_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _second_gradients(ctx, *grad_grads):
    grad_up, x, weight = ctx.saved_tensors
    inputs = x, weight, x.new_zeros(weight.shape[1])  # the bias, whose value does not matter
    return second_order(reference.up_as_product, grad_up, inputs, grad_grads)[:3]


_FORWARD = Form(_SCHEMA, _fake, flops.forward, _save, _gradients)
_BACKWARD = Form(_BACKWARD_SCHEMA, _fake_backward, flops.backward, _save_backward, _second_gradients)
_BACKENDS = "cpu", "triton", "cuda"
_WITH_FORMS = "cpu", "triton"
_KERNELS = define_differentiable("upconv_concat", _BACKENDS, _FORWARD, _BACKWARD, with_forms=_WITH_FORMS)
_WRITE = {
    backend: define_without_gradient(
        f"upconv_concat_out_{backend}", _OUT_SCHEMA, flops=flops.forward, has_forms=backend in _WITH_FORMS
    )
    for backend in _KERNELS
}


def _run_on(backend: str, *form: str):
    def run(x, weight, bias, skip, skip_first, out):
        if out is None:
            return _KERNELS[backend](x, weight, bias, skip, skip_first, gives_channels_last(x, skip), *form)
        _WRITE[backend](x, weight, bias, skip, skip_first, out, *form)
        return out

    return run


def _run_reference(x, weight, bias, skip, skip_first, out):
    result = reference.upconv_concat(x, weight, bias, skip, skip_first=skip_first)
    return result if out is None else out.copy_(result)


OPERATOR = register(
    "upconv_concat",
    Implementation("cuda", _run_on("cuda"), cuda_can_run, automatic=False),
    Implementation("triton", _run_on("triton"), triton_can_run, automatic=False),
    *(
        Implementation("triton", _run_on("triton", form), can_run, automatic=False, form=form)
        for form, can_run in TRITON_FORMS.items()
    ),
    Implementation("cpu", _run_on("cpu"), cpu_can_run),
    *(Implementation("cpu", _run_on("cpu", form), can_run, form=form) for form, can_run in CPU_FORMS.items()),
    Implementation("reference", _run_reference, lambda x, weight: None),
    workloads=WORKLOADS,
)
triton_support.implement(__package__, "upconv_concat", "out")


def _check_out(out, x, weight, bias, skip) -> None:
    check_floating("out", out)
    check_same("out", out, "x", x)
    batch, _, height, width = x.shape
    scale = weight.shape[2]
    channels = weight.shape[1] + (0 if skip is None else skip.shape[1])
    if out.shape != (batch, channels, scale * height, scale * width):
        expected = [batch, channels, scale * height, scale * width]
        raise ValueError(f"out: got shape {list(out.shape)}, expected {expected}")
    if 1 not in (out.stride(1), out.stride(3)):
        raise ValueError(
            f"out: got strides {list(out.stride())}, expected 1 for the channels or for the last dimension"
        )
    check_not_recorded("out", out, (x, weight, bias, skip, out))


def upconv_concat(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    skip: torch.Tensor | None,
    *,
    skip_first: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Transposed convolution with kernel = stride, concatenated with a skip connection, in one result.

    torch.cat((F.conv_transpose2d(x, weight, bias, stride=k), skip), 1), as in the decoder of a U-Net (arXiv:1505.04597)
    and in Token Fusion (Choi et al., 2022), without the up-sampled map by itself. Differentiable in
    x, weight, bias and skip.

    Args:
        x: [B, Cin, h, w], contiguous or channels_last; any strides.
        weight: [Cin, Cout, k, k], as in nn.ConvTranspose2d; the stride is k. k in 2, 4, 8, 16, 32 has kernels.
        bias: [Cout] or None.
        skip: [B, Cs, k h, k w]; or None, for the up-convolution alone.
        skip_first: the skip comes first in the result.
        out: where to write, for inference: [B, Cout + Cs, k h, k w], with channels or the last dimension contiguous. A
            skip that is its slice of out already is not copied; no other input may share memory with out.

    All of one device and of one dtype: float16, bfloat16, float32 or float64. Under autocast they are cast to the lower
    precision, as by nn.ConvTranspose2d.

    Returns:
        [B, Cout + Cs, k h, k w]; channels_last where x and skip are.

    Raises:
        TypeError: a dtype that is not floating point, or differing dtypes.
        ValueError: wrong rank, a kernel that is not square, mismatching sizes, tensors on different devices; an out of
            the wrong shape, or while a gradient is recorded.
        RuntimeError: the backend chosen by `set_backend` cannot run this call; the message says why.
    """
    x, weight, bias, skip = autocast(x, weight, bias, skip)
    check_upconv(x, weight, bias, skip)
    if out is not None:
        _check_out(out, x, weight, bias, skip)
    return OPERATOR.select(x, weight).run(x, weight, bias, skip, skip_first, out)
