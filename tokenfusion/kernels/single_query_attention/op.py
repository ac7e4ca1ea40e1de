"""single_query_attention: argument checks, registration, autograd and the public function."""

import torch
from torch._guards import detect_fake_mode

from tokenfusion.kernels import extension, triton_support
from tokenfusion.kernels.checks import (
    autocast_like,
    check_floating,
    check_rank,
    check_same,
    check_shape,
    symbolic,
)
from tokenfusion.kernels.dispatch import Implementation, register, transform
from tokenfusion.kernels.library import Form, define_differentiable, second_order
from tokenfusion.kernels.single_query_attention import flops, reference
from tokenfusion.kernels.single_query_attention.shapes import empty_gradients, statistics_dtype
from tokenfusion.kernels.single_query_attention.workloads import WORKLOADS

_MAX_CHANNELS = 4096
_ITEMS_PER_THREAD = 4  # below which csrc/cpu/single_query_attention.cpp cuts images into parts
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_SCHEMA = (
    "(Tensor query, Tensor tokens, Tensor? extra_token, Tensor? lengths, Tensor? offsets, bool normalize, float eps)"
    " -> (Tensor context, Tensor log_sum_exp)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_context, Tensor query, Tensor tokens, Tensor? extra_token, Tensor? lengths, Tensor? offsets,"
    " Tensor context, Tensor log_sum_exp, bool normalize, float eps, bool[3] needed)"
    " -> (Tensor grad_query, Tensor grad_tokens, Tensor grad_extra_token)"
)


def _fake(query, tokens, extra_token, lengths, offsets, normalize, eps):
    context = torch.empty_like(query, memory_format=torch.contiguous_format)
    return context, query.new_empty(query.shape[:2], dtype=statistics_dtype(tokens))


def _fake_backward(grad_context, query, tokens, extra_token, *rest):
    return empty_gradients(query, tokens, extra_token, needed=rest[-1])


def _save(ctx, inputs, output):
    *tensors, ctx.normalize, ctx.eps = inputs
    context, log_sum_exp = output
    ctx.mark_non_differentiable(log_sum_exp)
    ctx.save_for_backward(*tensors, context, log_sum_exp)


def _gradients(ctx, run_backward, grad_context, _):
    return run_backward(grad_context, *ctx.saved_tensors, ctx.normalize, ctx.eps, ctx.needs_input_grad[:3])


def _save_backward(ctx, inputs, output):
    *tensors, _, _, ctx.normalize, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _second_gradients(ctx, *grad_grads):
    grad_context, *inputs, lengths, offsets = ctx.saved_tensors
    rest = lengths, offsets, ctx.normalize, ctx.eps
    return second_order(lambda *tensors: _run_reference(*tensors, *rest), grad_context, inputs, grad_grads)


_FORWARD = Form(_SCHEMA, _fake, flops.forward, _save, _gradients)
_BACKWARD = Form(_BACKWARD_SCHEMA, _fake_backward, flops.backward, _save_backward, _second_gradients)
_BACKENDS = "cpu", "triton", "cuda"
_KERNELS = define_differentiable("single_query_attention", _BACKENDS, _FORWARD, _BACKWARD, with_forms=("cpu", "triton"))


def _run_on(backend: str, *form: str):
    def run(*call):
        return _KERNELS[backend](*call, *form)[0]

    return run


def _run_reference(query, tokens, extra_token, lengths, offsets, normalize, eps):
    if offsets is not None:
        tokens, lengths = padded(tokens, lengths, offsets)
    return reference.single_query_attention(query, tokens, extra_token, lengths=lengths, normalize=normalize, eps=eps)


def _why_not_kernel(query, tokens, dtypes) -> str | None:
    """What the kernels of every backend ask of a call."""
    channels = tokens.shape[2]
    if tokens.dtype not in dtypes:
        return f"dtype {tokens.dtype} is not supported"
    if channels % 8 or channels > _MAX_CHANNELS:
        return f"C = {channels} is not a multiple of 8 up to {_MAX_CHANNELS}"
    if tokens.stride(2) != 1:
        return "the innermost dimension of tokens is not contiguous"
    return None


def _cpu_can_run(query, tokens, extra_token, lengths=None, offsets=None) -> str | None:
    return extension.why_not_tensor(tokens) or _why_not_kernel(query, tokens, _CPU_DTYPES)


def _vectors_can_run(query, tokens, extra_token, lengths=None, offsets=None) -> str | None:
    reason = _cpu_can_run(query, tokens, extra_token, lengths, offsets)
    has_tiles = tokens.dtype == torch.bfloat16 and extension.amx_allowed()
    return reason or (None if has_tiles else "there are no tiles (AMX) for it")


def _few_can_run(query, tokens, extra_token, lengths=None, offsets=None) -> str | None:
    reason = _cpu_can_run(query, tokens, extra_token, lengths, offsets)
    cuts = query.shape[0] < _ITEMS_PER_THREAD * extension.threads()
    return reason or (None if cuts else "no image is cut into parts")


def _few_vectors_can_run(*tensors) -> str | None:
    return _vectors_can_run(*tensors) or _few_can_run(*tensors)


def _triton_can_run(query, tokens, extra_token, lengths=None, offsets=None) -> str | None:
    return triton_support.why_not_tensor(tokens) or _why_not_kernel(query, tokens, _GPU_DTYPES)


def _why_not_aligned(tokens) -> str | None:
    unit = 16 // tokens.element_size()
    steps = [stride for size, stride in zip(tokens.shape[:2], tokens.stride()) if size != 1]
    if not torch.compiler.is_compiling():  # cannot ask; the operator checks it
        steps.append(tokens.storage_offset())
    if any(step % unit for step in steps):
        return "the rows of tokens are not aligned to 16 bytes"
    return None


def _why_not_cuda_kernel(tokens) -> str | None:
    if tokens.shape[2] % 16:
        return f"C = {tokens.shape[2]} is not a multiple of 16"
    return _why_not_aligned(tokens)


def _cuda_can_run(query, tokens, extra_token, lengths=None, offsets=None) -> str | None:
    return (
        extension.why_not_cuda_tensor(tokens)
        or _why_not_kernel(query, tokens, _GPU_DTYPES)
        or _why_not_cuda_kernel(tokens)
    )


OPERATOR = register(
    "single_query_attention",
    Implementation("cuda", _run_on("cuda"), _cuda_can_run, automatic=False),
    Implementation("triton", _run_on("triton"), _triton_can_run, automatic=False),
    Implementation("triton", _run_on("triton", "split"), _triton_can_run, automatic=False, form="split"),
    Implementation("cpu", _run_on("cpu"), _cpu_can_run),
    Implementation("cpu", _run_on("cpu", "vectors"), _vectors_can_run, form="vectors"),
    Implementation("cpu", _run_on("cpu", "few"), _few_can_run, form="few"),
    Implementation("cpu", _run_on("cpu", "vectors,few"), _few_vectors_can_run, form="vectors,few"),
    Implementation("reference", _run_reference, lambda query, tokens, extra_token, lengths=None, offsets=None: None),
    workloads=WORKLOADS,
)
triton_support.implement(__package__, "single_query_attention")


def check_lengths(lengths, tokens) -> None:
    if not isinstance(lengths, torch.Tensor):
        raise TypeError(f"lengths: got {type(lengths).__name__}, expected a torch.Tensor")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths: got dtype {lengths.dtype}, expected int32 or int64")
    check_rank("lengths", lengths, "[B]")
    check_shape("lengths", lengths, [tokens.shape[0]], f"to match tokens {list(tokens.shape)}")
    if lengths.device != tokens.device:
        raise ValueError(f"lengths: got a tensor on {lengths.device}, expected {tokens.device}, where tokens is")
    if has_values(lengths):
        outside = [length for length in lengths.tolist() if not 0 <= length <= tokens.shape[1]]
        if outside:
            raise ValueError(f"lengths: got {outside[0]}, expected 0 to N = {tokens.shape[1]}")


def _is_traced(tensor) -> bool:
    """Whether there are no values yet."""
    return (
        tensor.is_meta
        or torch.compiler.is_compiling()
        or transform() is not None
        or detect_fake_mode(tensor) is not None
    )


def has_values(tensor) -> bool:
    """Whether they can be looked at without waiting for a GPU, and without a tracer that sees it."""
    return tensor.device.type == "cpu" and not _is_traced(tensor)


def is_nested(tokens) -> bool:
    return isinstance(tokens, torch.Tensor) and tokens.is_nested


def packed(tokens, lengths=None) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """A jagged tensor [B, bags of differing numbers of tokens, C] as the memory that it is in.

    Returns:
        (tokens [1, T, C] of all bags, lengths [B] or None, offsets [B + 1]): bag b has the tokens from offsets[b] on up
        to offsets[b + 1], or lengths[b] of them.

    Raises:
        TypeError: another layout, or offsets or lengths that are no integers.
        ValueError: another dimension than the second is jagged, or there are more; lengths beside its own; offsets or
            lengths of which some lie outside the memory, or overlap, on a CPU.
    """
    if lengths is not None:
        raise ValueError("lengths: got some beside nested tokens, which have their own; expected None")
    if tokens.layout != torch.jagged:
        raise TypeError(f"tokens: got a nested tensor of layout {tokens.layout}, expected torch.jagged")
    if tokens.dim() != 3 or tokens._ragged_idx != 1:
        raise ValueError(f"tokens: got a nested tensor of shape {list(tokens.shape)}, expected [B, jagged, C]")
    values, lengths, offsets = tokens.values().unsqueeze(0), tokens.lengths(), tokens.offsets()
    for name, integers in (("offsets", offsets), ("lengths", lengths)):
        if integers is not None and integers.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"tokens: got {name} of dtype {integers.dtype}, expected int32 or int64")
    if has_values(offsets):
        _check_bags(offsets.tolist(), None if lengths is None else lengths.tolist(), values.shape[1])
    return values, lengths, offsets


def _check_bags(offsets: list[int], lengths: list[int] | None, tokens: int) -> None:
    if offsets[0] < 0 or offsets[-1] > tokens or offsets != sorted(offsets):
        raise ValueError(f"tokens: got offsets {offsets}, expected them to grow from 0 to at most {tokens}")
    if lengths is None:
        return
    for length, first, end in zip(lengths, offsets[:-1], offsets[1:], strict=True):
        if not 0 <= length <= end - first:
            raise ValueError(f"tokens: got a length of {length} from {first} on, expected 0 to {end - first}")


def padded(tokens, lengths, offsets) -> tuple[torch.Tensor, torch.Tensor]:
    """What `packed` gives as [B, N, C] and lengths [B]; N is the longest bag's, or enough where it is traced."""
    longest = tokens.shape[1] if _is_traced(tokens) else max(offsets.diff().tolist(), default=0)
    return reference.padded(tokens, lengths, offsets, longest)


def _check(query, tokens, extra_token, lengths, offsets) -> None:
    if symbolic(query, tokens, extra_token, lengths):
        return
    check_floating("query", query)
    check_floating("tokens", tokens)
    check_rank("query", query, "[B, Q, C]")
    check_rank("tokens", tokens, "[B, N, C]")
    check_same("query", query, "tokens", tokens)
    batch, channels = tokens.shape[0] if offsets is None else offsets.shape[0] - 1, tokens.shape[2]
    like = f"to match tokens {list(tokens.shape)}" if offsets is None else f"to match {batch} bags of C = {channels}"
    if query.shape[0] != batch or query.shape[2] != channels:
        raise ValueError(f"query: got shape {list(query.shape)}, expected [{batch}, Q, {channels}] {like}")
    if extra_token is not None:
        check_floating("extra_token", extra_token)
        check_rank("extra_token", extra_token, "[B, C]")
        check_same("extra_token", extra_token, "tokens", tokens)
        check_shape("extra_token", extra_token, [batch, channels], like)
    if offsets is not None:
        return
    if lengths is not None:
        check_lengths(lengths, tokens)
    if tokens.shape[1] == 0:
        raise ValueError(f"tokens: got shape {list(tokens.shape)}, expected at least one token (N >= 1)")


def single_query_attention(
    query: torch.Tensor,
    tokens: torch.Tensor,
    extra_token: torch.Tensor | None = None,
    *,
    lengths: torch.Tensor | None = None,
    normalize: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Attention of a few queries over tokens that are their own keys and values, in one pass over the tokens.

    context[b, q] = sum_j p_j n_j with p = softmax_j(query[b, q] . n_j), j over {extra_token, tokens}; n is the token,
    or its LayerNorm without affine when normalize. Multi-head attention of one query token (CrossViT,
    arXiv:2103.14899, Eq. 6) is this with query = W_k^T q for each head; `reference.py` has the algebra. Scale the
    query beforehand: the scores are not divided by anything. Differentiable in all three tensors.

    Args:
        query: [B, Q, C]; Q = heads x queries.
        tokens: [B, N, C], N >= 1, any strides (a slice such as x[:, 1:] is read in place). Or a jagged nested tensor
            (torch.nested, layout=torch.jagged) of B bags with C channels, without padding: its values are read in
            place, and what `torch.nested.narrow` leaves out is not read. A bag may be empty.
        extra_token: [B, C], one more token that takes part, such as a class token of another branch; or None.
        lengths: [B], int32 or int64: tokens[b, lengths[b]:] take no part, are not read, and have a gradient of zero;
            extra_token takes part always. Where nothing does, the context is zero. None: all take part. Nested tokens
            have lengths of their own.
        normalize: use (t - mean) / sqrt(variance + eps) over C in place of each token t.
        eps: added to the variance.

    All of one device and, but for lengths, of one dtype: float16, bfloat16, float32 or float64. Under autocast, query
    and extra_token are cast to the dtype of the tokens, which are read as they are.

    Returns:
        context [B, Q, C], in the dtype of the tokens.

    Raises:
        TypeError: a dtype that is not floating point, or differing dtypes; lengths of another dtype; a nested tensor of
            another layout than torch.jagged.
        ValueError: wrong rank, mismatching B or C, no token, tensors on different devices; lengths beside nested
            tokens; a length that is negative or beyond N, or offsets of nested tokens that shrink or lie outside their
            values, on a CPU. On a GPU and under transforms, where nobody looks, it is as the nearest one inside.
        RuntimeError: the backend chosen by `set_backend` cannot run this call; the message says why.
    """
    offsets = None
    if is_nested(tokens):
        tokens, lengths, offsets = packed(tokens, lengths)
    query, extra_token = autocast_like(tokens, query, extra_token)
    _check(query, tokens, extra_token, lengths, offsets)
    implementation = OPERATOR.select(query, tokens, extra_token, lengths, offsets)
    return implementation.run(query, tokens, extra_token, lengths, offsets, normalize, eps)
