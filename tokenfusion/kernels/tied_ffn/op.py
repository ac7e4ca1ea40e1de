"""tied_ffn: argument checks, registration, autograd and the public function."""

import functools

import torch

from tokenfusion.kernels import extension, triton_support
from tokenfusion.kernels.checks import autocast, check_floating, check_rank, check_same, symbolic
from tokenfusion.kernels.dispatch import Implementation, register
from tokenfusion.kernels.library import Form, define_differentiable, second_order
from tokenfusion.kernels.tied_ffn import flops, reference
from tokenfusion.kernels.tied_ffn.shapes import empty_gradients, empty_outputs
from tokenfusion.kernels.tied_ffn.workloads import WORKLOADS

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_TRITON_TILES = "small", "deep"  # see _options in triton_host.py
_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# hidden is the pre-activation x W^T + bias_in; of size 0 where it is not held and has to be computed again
_SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias_in, Tensor? bias_out, str activation, bool hold)"
    " -> (Tensor y, Tensor hidden)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias_in, Tensor hidden, str activation, bool[4] needed)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias_in, Tensor grad_bias_out)"
)


def _fake(x, weight, bias_in, bias_out, activation, hold):
    return empty_outputs(x, weight, hold)


def _fake_backward(grad_y, x, weight, bias_in, hidden, activation, needed):
    return empty_gradients(x, weight, needed)


def _save(ctx, inputs, output):
    x, weight, bias_in, _, ctx.activation, _ = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(x, weight, bias_in, hidden)


def _gradients(ctx, run_backward, grad_y, _):
    return run_backward(grad_y, *ctx.saved_tensors, ctx.activation, ctx.needs_input_grad[:4])


def _save_backward(ctx, inputs, output):
    grad_y, x, weight, bias_in, _, ctx.activation = inputs
    ctx.save_for_backward(grad_y, x, weight, bias_in)


def _second_gradients(ctx, *grad_grads):
    grad_y, x, weight, bias_in = ctx.saved_tensors
    bias_out = x.new_zeros(x.shape[-1])  # no gradient depends on its value
    definition = functools.partial(reference.tied_ffn, activation=ctx.activation)
    return second_order(definition, grad_y, (x, weight, bias_in, bias_out), grad_grads)[:4]


_FORWARD = Form(_SCHEMA, _fake, flops.forward, _save, _gradients)
_BACKWARD = Form(_BACKWARD_SCHEMA, _fake_backward, flops.backward, _save_backward, _second_gradients)
_BACKENDS = "cpu", "triton", "cuda"
_KERNELS = define_differentiable("tied_ffn", _BACKENDS, _FORWARD, _BACKWARD, with_forms=("cpu", "triton"))


def _run_on(backend: str, *form: str, holds: bool = False):
    def run(x, weight, bias_in, bias_out, activation, recompute):
        tensors = (x, weight, bias_in, bias_out)
        wanted = holds if recompute == "auto" else not recompute
        hold = wanted and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        return _KERNELS[backend](*tensors, activation, hold, *form)[0]

    return run


def _run_reference(x, weight, bias_in, bias_out, activation, recompute):
    return reference.tied_ffn(x, weight, bias_in, bias_out, activation=activation)


def _why_not_dtype(x, dtypes) -> str | None:
    return None if x.dtype in dtypes else f"dtype {x.dtype} is not supported"


def _cpu_can_run(x, weight, bias_in, bias_out) -> str | None:
    return extension.why_not_tensor(x) or _why_not_dtype(x, _CPU_DTYPES)


def _triton_can_run(x, weight, bias_in, bias_out) -> str | None:
    return triton_support.why_not_tensor(x) or _why_not_dtype(x, _GPU_DTYPES)


def _cuda_can_run(x, weight, bias_in, bias_out) -> str | None:
    return extension.why_not_cuda_tensor(x) or _why_not_dtype(x, _GPU_DTYPES)


def _blas_can_run(x, weight, bias_in, bias_out) -> str | None:
    reason = _cpu_can_run(x, weight, bias_in, bias_out)
    return reason or (None if x.dtype == torch.float32 else "it differs in float32 alone")


def _tiles_can_run(x, weight, bias_in, bias_out) -> str | None:
    reason = _triton_can_run(x, weight, bias_in, bias_out)
    return reason or ("there is one size of tiles in float32" if x.dtype == torch.float32 else None)


def _holding(can_run):
    def holding_can_run(*tensors) -> str | None:
        trains = any(tensor is not None and tensor.requires_grad for tensor in tensors)
        return can_run(*tensors) if trains else "nothing is held in inference"

    return holding_can_run


OPERATOR = register(
    "tied_ffn",
    Implementation("cuda", _run_on("cuda"), _cuda_can_run, automatic=False),
    Implementation("cuda", _run_on("cuda", holds=True), _holding(_cuda_can_run), automatic=False, form="hold"),
    Implementation("triton", _run_on("triton"), _triton_can_run, automatic=False),
    Implementation("triton", _run_on("triton", holds=True), _holding(_triton_can_run), automatic=False, form="hold"),
    *(Implementation("triton", _run_on("triton", t), _tiles_can_run, automatic=False, form=t) for t in _TRITON_TILES),
    Implementation("cpu", _run_on("cpu"), _cpu_can_run),
    Implementation("cpu", _run_on("cpu", holds=True), _holding(_cpu_can_run), form="hold"),
    Implementation("cpu", _run_on("cpu", "blas"), _blas_can_run, form="blas"),
    Implementation("cpu", _run_on("cpu", "blas", holds=True), _holding(_blas_can_run), form="blas,hold"),
    Implementation("reference", _run_reference, lambda x, weight, bias_in, bias_out: None),
    workloads=WORKLOADS,
)
triton_support.implement(__package__, "tied_ffn")


def _check(x, weight, bias_in, bias_out, activation) -> None:
    if symbolic(x, weight, bias_in, bias_out):
        return
    check_floating("x", x)
    check_floating("weight", weight)
    check_rank("weight", weight, "[F, C]")
    check_same("weight", weight, "x", x)
    features, channels = weight.shape
    if weight.numel() == 0:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected at least one feature and one channel")
    if x.dim() == 0 or x.shape[-1] != channels:
        raise ValueError(
            f"x: got shape {list(x.shape)}, expected [..., {channels}] to match weight {list(weight.shape)}"
        )
    for name, bias, size in (("bias_in", bias_in, features), ("bias_out", bias_out, channels)):
        if bias is not None:
            check_floating(name, bias)
            check_same(name, bias, "x", x)
            if bias.shape != (size,):
                raise ValueError(
                    f"{name}: got shape {list(bias.shape)}, expected [{size}] to match weight {list(weight.shape)}"
                )
    if activation not in reference.ACTIVATIONS:
        expected = ", ".join(map(repr, reference.ACTIVATIONS))
        raise ValueError(f"activation: got {activation!r}, expected one of {expected}")


def check_recompute(recompute: bool | str) -> None:
    if recompute not in (True, False, "auto"):
        raise ValueError(f"recompute: got {recompute!r}, expected True, False or 'auto'")


def tied_ffn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias_in: torch.Tensor | None = None,
    bias_out: torch.Tensor | None = None,
    *,
    activation: str = "gelu",
    recompute: bool | str = "auto",
) -> torch.Tensor:
    """A feed-forward network with one matrix for both its layers: y = act(x W^T + b_in) W + b_out.

    The parameter-efficient feed-forward network of Koyun and Töreyin (arXiv:2401.16438), Eq. 4; `reference.py` has the
    algebra of its gradients. Differentiable, twice, in all four tensors; the weight gets one gradient, the sum over
    both its uses.

    Args:
        x: [..., C], of any number of dimensions. Copied where its leading dimensions cannot be merged, as by F.linear.
        weight: [F, C].
        bias_in: [F], or None.
        bias_out: [C], or None.
        activation: "gelu" (exact), "gelu_tanh", "relu", "silu" or "identity".
        recompute: True holds x alone for the backward pass, which computes x W^T again. False holds the pre-activation
            x W^T + b_in too: F / C times the memory of x, and one matrix product of seven less. "auto" is whatever was
            found to be fastest on this kind of machine (see `tokenfusion tune`), and True where nothing was. The
            reference backend holds all that autograd does.

    All of one device and of one dtype: float16, bfloat16, float32 or float64. Under autocast they are cast to its
    dtype, as those of F.linear are.

    Returns:
        y [..., C], in the dtype of x.

    Raises:
        TypeError: a dtype that is not floating point, or differing dtypes.
        ValueError: wrong rank, mismatching C or F, an unknown activation or recompute, tensors on different devices.
        RuntimeError: the backend chosen by `set_backend` cannot run this call; the message says why.
    """
    x, weight, bias_in, bias_out = autocast(x, weight, bias_in, bias_out)
    _check(x, weight, bias_in, bias_out, activation)
    check_recompute(recompute)
    select = OPERATOR.select if recompute == "auto" else OPERATOR.select_in_order
    implementation = select(x, weight, bias_in, bias_out)
    return implementation.run(x, weight, bias_in, bias_out, activation, recompute)
