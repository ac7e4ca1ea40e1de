"""dynamic_mixing: argument checks, registration, autograd and the public function."""

import functools

import torch
import torch.nn.functional as F

from tokenfusion.kernels import extension, triton_support
from tokenfusion.kernels.checks import autocast, check_floating, check_rank, check_same, check_shape, symbolic
from tokenfusion.kernels.dispatch import Implementation, register
from tokenfusion.kernels.dynamic_mixing import flops, reference
from tokenfusion.kernels.dynamic_mixing.shapes import empty_gradients, empty_mean
from tokenfusion.kernels.dynamic_mixing.workloads import WORKLOADS
from tokenfusion.kernels.library import Form, define_differentiable, second_order

MAX_TOKENS = 64
MAX_REDUCED = 16
MAX_TRITON_WIDTH = 1 << 18  # channels of a segment, whose blocks lie along the second axis of a grid
_ROWS_PER_TILE = 16, 64  # and of tall ones, as in csrc/cpu/dynamic_mixing.cpp
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_LAYOUTS = {
    "compress_weight": "[S * d, D]",
    "compress_bias": "[S * d]",
    "generate_weight": "[N * N, N * d]",
    "generate_bias": "[N * N]",
}

_SCHEMA = (
    "(Tensor x, Tensor compressed, Tensor generate_weight, Tensor generate_bias, int segments, int dim, bool with_mean)"
    " -> (Tensor mixed, Tensor mean)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_mixed, Tensor? grad_mean, Tensor x, Tensor compressed, Tensor generate_weight, Tensor generate_bias,"
    " int segments, int dim, bool[4] needed)"
    " -> (Tensor grad_x, Tensor grad_compressed, Tensor grad_generate_weight, Tensor grad_generate_bias)"
)


def _fake(x, compressed, generate_weight, generate_bias, segments, dim, with_mean):
    return torch.empty_like(x, memory_format=torch.contiguous_format), empty_mean(x, with_mean)


def _fake_backward(grad_mixed, grad_mean, x, compressed, generate_weight, generate_bias, segments, dim, needed):
    return empty_gradients((x, compressed, generate_weight, generate_bias), needed)


def _save(ctx, inputs, output):
    *tensors, ctx.segments, ctx.dim, ctx.with_mean = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, run_backward, grad_mixed, grad_mean):
    x, *rest = ctx.saved_tensors
    grad_mean = grad_mean if ctx.with_mean else None
    if grad_mixed is None:
        grad_mixed = torch.zeros((), dtype=x.dtype, device=x.device).expand_as(x)
    return run_backward(grad_mixed, grad_mean, x, *rest, ctx.segments, ctx.dim, ctx.needs_input_grad[:4])


def _save_backward(ctx, inputs, output):
    *tensors, ctx.segments, ctx.dim = inputs
    ctx.save_for_backward(*tensors)


def _second_gradients(ctx, *grad_grads):
    grad_mixed, grad_mean, *inputs = ctx.saved_tensors
    tokens = grad_mixed.shape[1] * grad_mixed.shape[2]
    total = grad_mixed if grad_mean is None else grad_mixed + grad_mean[:, None, None] / tokens
    definition = functools.partial(reference.mix, segments=ctx.segments, dim=ctx.dim)
    of_total, *grads = second_order(definition, total, inputs, grad_grads)
    of_mean = None if grad_mean is None or of_total is None else of_total.mean(dim=(1, 2))
    return of_total, of_mean, *grads


_FORWARD = Form(_SCHEMA, _fake, flops.forward, _save, _gradients)
_BACKWARD = Form(_BACKWARD_SCHEMA, _fake_backward, flops.backward, _save_backward, _second_gradients)
_BACKENDS = "cpu", "triton", "cuda"
_KERNELS = define_differentiable("dynamic_mixing", _BACKENDS, _FORWARD, _BACKWARD, with_forms=("cpu",))


def _run_reference(x, compressed, generate_weight, generate_bias, segments, dim, with_mean):
    mixed = reference.mix(x, compressed, generate_weight, generate_bias, segments=segments, dim=dim)
    return mixed, mixed.mean(dim=(1, 2)) if with_mean else empty_mean(x, with_mean)


def _with_form(form: str):
    return lambda *call: _KERNELS["cpu"](*call, form)


def _why_not_kernel(x, compressed, segments, dim, dtypes) -> str | None:
    """What the kernels of every backend ask of a call."""
    if x.dtype not in dtypes:
        return f"dtype {x.dtype} is not supported"
    if x.shape[dim] > MAX_TOKENS:
        return f"N = {x.shape[dim]} is more than {MAX_TOKENS}"
    if compressed.shape[3] > MAX_REDUCED * segments:
        return f"d = {compressed.shape[3] // segments} is more than {MAX_REDUCED}"
    if x.stride(3) != 1 or compressed.stride(3) != 1:
        return "the innermost dimension of x is not contiguous"
    return None


def _cpu_can_run(x, compressed, generate_weight, generate_bias, segments, dim) -> str | None:
    return extension.why_not_tensor(x) or _why_not_kernel(x, compressed, segments, dim, _CPU_DTYPES)


def _has_tiles(x) -> bool:
    return x.dtype == torch.bfloat16 and extension.amx_allowed()


def _vectors_can_run(x, *others) -> str | None:
    return _cpu_can_run(x, *others) or (None if _has_tiles(x) else "there are no tiles (AMX) for it")


def _tall_can_run(x, compressed, generate_weight, generate_bias, segments, dim) -> str | None:
    reason = _cpu_can_run(x, compressed, generate_weight, generate_bias, segments, dim)
    if reason is None and _has_tiles(x):
        return "those of AMX are tall"
    short, tall = (-(-rows // segments) for rows in _ROWS_PER_TILE)
    differs = short < tall and short * extension.threads() < x.shape[0] * x.shape[3 - dim]
    return reason or (None if differs else "its tiles are no taller")


def _triton_can_run(x, compressed, generate_weight, generate_bias, segments, dim) -> str | None:
    return (
        triton_support.why_not_tensor(x)
        or _why_not_kernel(x, compressed, segments, dim, _GPU_DTYPES)
        or _why_not_triton_kernel(x, segments)
    )


def _why_not_triton_kernel(x, segments) -> str | None:
    width = x.shape[3] // segments
    return f"D / S = {width} is more than {MAX_TRITON_WIDTH}" if width > MAX_TRITON_WIDTH else None


@functools.cache
def _query_cuda_max_reduced(tokens: int, itemsize: int, device: int) -> int:
    from tokenfusion import _C

    return _C.dynamic_mixing_cuda_max_reduced(tokens, itemsize, device)


@torch.compiler.assume_constant_result
def _cuda_max_reduced(tokens: int, itemsize: int, device: int) -> int:
    """As large a d as the GPU's shared memory suffices for."""
    return _query_cuda_max_reduced(tokens, itemsize, device)


def _why_not_cuda_kernel(x, compressed, segments, dim) -> str | None:
    reduced = compressed.shape[3] // segments
    tokens = next(limit for limit in range(8, MAX_TOKENS + 1, 8) if x.shape[dim] <= limit)
    most = _cuda_max_reduced(tokens, x.element_size(), x.device.index)
    if reduced > most:
        return f"d = {reduced} is more than the {most} that this GPU can take with N = {x.shape[dim]}"
    return None


def _cuda_can_run(x, compressed, generate_weight, generate_bias, segments, dim) -> str | None:
    return (
        extension.why_not_cuda_tensor(x)
        or _why_not_kernel(x, compressed, segments, dim, _GPU_DTYPES)
        or _why_not_cuda_kernel(x, compressed, segments, dim)
    )


OPERATOR = register(
    "dynamic_mixing",
    Implementation("cuda", _KERNELS["cuda"], _cuda_can_run, automatic=False),
    Implementation("triton", _KERNELS["triton"], _triton_can_run, automatic=False),
    Implementation("cpu", _KERNELS["cpu"], _cpu_can_run),
    Implementation("cpu", _with_form("tall"), _tall_can_run, form="tall"),
    Implementation("cpu", _with_form("vectors"), _vectors_can_run, form="vectors"),
    Implementation("reference", _run_reference, lambda *call: None),
    workloads=WORKLOADS,
)
triton_support.implement(__package__, "dynamic_mixing")


def _check(x, weights: dict[str, torch.Tensor], segments: int, dim: int) -> None:
    if symbolic(x, *weights.values()):
        return
    check_floating("x", x)
    check_rank("x", x, "[B, H, W, D]")
    if dim not in (1, 2):
        raise ValueError(f"dim: got {dim!r}, expected 1 (along H) or 2 (along W)")
    channels, length = x.shape[3], x.shape[dim]
    if not isinstance(segments, int) or segments < 1 or channels % segments:
        raise ValueError(f"segments: got {segments!r}, expected a divisor of D = {channels} of x {list(x.shape)}")
    if length == 0:
        raise ValueError(f"x: got shape {list(x.shape)}, expected at least one token along dimension {dim}")
    for name, weight in weights.items():
        check_floating(name, weight)
        check_rank(name, weight, _LAYOUTS[name])
        check_same(name, weight, "x", x)
    rows = weights["compress_weight"].shape[0]
    if rows % segments or rows == 0:
        raise ValueError(
            f"compress_weight: got shape {list(weights['compress_weight'].shape)}, expected [S * d, {channels}] "
            f"with S = {segments} segments"
        )
    reduced = rows // segments
    for_x = f"for D = {channels} of x and S * d = {segments} * {reduced}"
    for_length = f"for N = {length} tokens along dimension {dim} of x {list(x.shape)} and d = {reduced}"
    check_shape("compress_weight", weights["compress_weight"], [rows, channels], for_x)
    check_shape("compress_bias", weights["compress_bias"], [rows], for_x)
    check_shape("generate_weight", weights["generate_weight"], [length**2, length * reduced], for_length)
    check_shape("generate_bias", weights["generate_bias"], [length**2], for_length)


def mix(
    x: torch.Tensor,
    compressed: torch.Tensor,
    generate_weight: torch.Tensor,
    generate_bias: torch.Tensor,
    *,
    segments: int,
    dim: int,
    with_mean: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dynamic_mixing after the compression, unchecked, for x [B, H, W, D] and compressed [B, H, W, S * d].

    Returns:
        mixed [B, H, W, D], and its mean over H and W, [B, D] (empty unless with_mean).
    """
    call = (x, compressed, generate_weight, generate_bias, segments, dim)
    return OPERATOR.select(*call).run(*call, with_mean)


def dynamic_mixing(
    x: torch.Tensor,
    compress_weight: torch.Tensor,
    compress_bias: torch.Tensor,
    generate_weight: torch.Tensor,
    generate_bias: torch.Tensor,
    *,
    segments: int,
    dim: int,
) -> torch.Tensor:
    """Mixes the tokens of every row or every column with weights that the tokens themselves generate.

    The DynaMixer operation without its output projection (arXiv:2201.12083, Eq. 5 to 7): each token is compressed to
    d numbers a segment; those of all N tokens of a line generate, for each of S segments of the channels, an N x N
    matrix, whose softmax over the sources mixes that segment. `reference.py` has the formula. Differentiable in all
    five tensors.

    Args:
        x: [B, H, W, D].
        compress_weight: [S * d, D].
        compress_bias: [S * d].
        generate_weight: [N * N, N * d], row i * N + j giving the weight of source i for target j; shared by the
            segments.
        generate_bias: [N * N].
        segments: S, a divisor of D.
        dim: 1 mixes along H (N = H), 2 along W (N = W).

    All of one device and of one dtype: float16, bfloat16, float32 or float64. Under autocast, all are cast to its
    dtype, as for a matrix product.

    Returns:
        [B, H, W, D], in the dtype of x.

    Raises:
        TypeError: a dtype that is not floating point, or differing dtypes.
        ValueError: wrong rank, segments that do not divide D, weights that do not match D, N, S or d, another dim,
            tensors on different devices.
        RuntimeError: the backend chosen by `set_backend` cannot run this call; the message says why.
    """
    x, *weights = autocast(x, compress_weight, compress_bias, generate_weight, generate_bias)
    _check(x, dict(zip(_LAYOUTS, weights, strict=True)), segments, dim)
    compress_weight, compress_bias, generate_weight, generate_bias = weights
    compressed = F.linear(x, compress_weight, compress_bias)
    return mix(x, compressed, generate_weight, generate_bias, segments=segments, dim=dim)[0]
