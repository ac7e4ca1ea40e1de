"""Launches of single_query_attention's Triton kernels: tiles, splits over the tokens, outputs and partial sums."""

import functools

import torch
import triton

from tokenfusion.kernels.single_query_attention import triton_kernels
from tokenfusion.kernels.single_query_attention.shapes import empty_gradients, statistics_dtype

PROGRAMS_PER_MULTIPROCESSOR = 2
MAX_SPLITS = 32
_MULTIPROCESSORS_ELSEWHERE = 132


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS_ELSEWHERE
    return torch.cuda.get_device_properties(device).multi_processor_count


def _tile(channels: int, itemsize: int, backward: bool) -> tuple[int, int, int, int]:
    """(widest chunk of C, tokens per block, warps, stages) that ptxas compiles without a spill for sm_90."""
    if itemsize == 4:
        if backward or channels > 256:
            return 64 if backward else 128, 16, 8, 1
        return 64, 32 if channels <= 192 else 16, 4, 1
    if channels <= 256:
        return 128, 16 if backward and channels > 128 else 32, 4, 2
    if backward:
        return 128, 16, 8, 1
    return 256, 32 if channels <= 768 else 16, 8, 2


def _query_block(queries: int, channels: int) -> int:
    """Queries that one program takes: 32 where needed and their C sums fit into registers, else 16 (tl.dot's least)."""
    return 32 if queries > 16 and channels <= 256 else 16


def _chunk(channels: int, widest: int) -> int:
    """The power of two from widest / 8 (at least 16) to `widest` that pads C least; of equals the widest."""
    widths = [width for width in (16, 32, 64, 128, 256) if widest <= 8 * width and width <= widest]
    return min(widths, key=lambda width: (triton.cdiv(channels, width) * width, -width))


def _splits(batch: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """How many programs share an image's token blocks, and how many blocks each takes; none is left without one."""
    wanted = PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(device) // batch
    blocks_per_split = triton.cdiv(blocks, max(1, min(wanted, MAX_SPLITS, blocks)))
    return triton.cdiv(blocks, blocks_per_split), blocks_per_split


def _plan(query, tokens, extra_token, lengths, offsets, normalize, eps, backward):
    """(splits, arguments and options that forward_kernel and backward_kernel share)."""
    batch, length, channels = query.shape[0], *tokens.shape[1:]
    widest, block_n, num_warps, num_stages = _tile(channels, tokens.element_size(), backward)
    has_extra = int(extra_token is not None)
    splits, blocks_per_split = _splits(batch, triton.cdiv(max(1, length + has_extra), block_n), tokens.device)
    pointers = tokens.data_ptr(), 0 if extra_token is None else extra_token.data_ptr()
    aligned = all(stride % 8 == 0 for stride in tokens.stride()[:2]) and all(p % 16 == 0 for p in pointers)
    stride_unit = 8 if aligned else 1
    return splits, dict(
        N=length,
        Q=query.shape[1],
        rows_per_split=blocks_per_split * block_n,
        stride_tb=tokens.stride(0) // stride_unit if offsets is None else 0,
        stride_tn=tokens.stride(1) // stride_unit,
        eps=eps,
        C=channels,
        BC=_chunk(channels, widest),
        BN=block_n,
        BQ=_query_block(query.shape[1], channels),
        STRIDE_UNIT=stride_unit,
        HAS_EXTRA=has_extra,
        HAS_LENGTHS=lengths is not None,
        HAS_OFFSETS=offsets is not None,
        NORMALIZE=normalize,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _combine(partial, partial_log_sum_exp, out, log_sum_exp):
    """Sum the splits' partial results in a fixed order; weighted by their log-sum-exp where given."""
    batch, splits, queries, channels = partial.shape
    block_c = 128
    triton_kernels.combine_kernel[batch, queries, triton.cdiv(channels, block_c)](
        partial,
        partial_log_sum_exp,
        out,
        log_sum_exp,
        splits,
        queries,
        C=channels,
        BC=block_c,
        BS=triton.next_power_of_2(splits),
        WEIGHTED=partial_log_sum_exp is not None,
    )


def run_forward(query, tokens, extra_token, lengths, offsets, normalize, eps):
    batch, queries, channels = query.shape
    query = query.contiguous()
    extra_token = None if extra_token is None else extra_token.contiguous()
    context = torch.empty_like(query)
    log_sum_exp = query.new_empty(batch, queries, dtype=statistics_dtype(tokens))
    if query.numel() == 0:
        return context, log_sum_exp
    splits, plan = _plan(query, tokens, extra_token, lengths, offsets, normalize, eps, backward=False)
    outputs = context, log_sum_exp
    if splits > 1:
        outputs = (
            query.new_empty(batch, splits, queries, channels, dtype=torch.float32),
            query.new_empty(batch, splits, queries, dtype=torch.float32),
        )
    with torch.cuda.device_of(tokens):
        triton_kernels.forward_kernel[batch, splits, triton.cdiv(queries, plan["BQ"])](
            query,
            tokens,
            tokens if extra_token is None else extra_token,
            tokens if lengths is None else lengths.contiguous(),
            tokens if offsets is None else offsets.contiguous(),
            *outputs,
            **plan,
        )
        if splits > 1:
            _combine(*outputs, context, log_sum_exp)
    return context, log_sum_exp


def run_backward(
    grad_context, query, tokens, extra_token, lengths, offsets, context, log_sum_exp, normalize, eps, needed
):
    batch, queries, channels = query.shape
    grads = empty_gradients(query, tokens, extra_token, needed)
    if query.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    splits, plan = _plan(query, tokens, extra_token, lengths, offsets, normalize, eps, backward=True)
    query_blocks = range(0, queries, plan["BQ"])
    grad_query, *grad_rows = grads
    if splits > 1 and needed[0]:
        grad_query = query.new_empty(batch, splits, queries, channels, dtype=torch.float32)
    if len(query_blocks) > 1:
        grad_rows = [torch.empty_like(grad, dtype=torch.float32) for grad in grad_rows]
    if offsets is not None:
        grad_rows[0].zero_()  # of what lies between the bags
    inputs = (
        grad_context.contiguous(),
        query.contiguous(),
        tokens,
        tokens if extra_token is None else extra_token.contiguous(),
        tokens if lengths is None else lengths.contiguous(),
        tokens if offsets is None else offsets.contiguous(),
        context.contiguous(),
        log_sum_exp.contiguous(),
    )
    with torch.cuda.device_of(tokens):
        for first_query in query_blocks:
            triton_kernels.backward_kernel[batch, splits](
                *inputs,
                grad_query,
                *grad_rows,
                first_query,
                **plan,
                NEED_QUERY=needed[0],
                NEED_TOKENS=needed[1],
                NEED_EXTRA=needed[2],
                ADD=first_query > 0,
            )
        if grad_query is not grads[0]:
            _combine(grad_query, None, grads[0], None)
            grad_query = grads[0]
    return grad_query, *(grad.to(tokens.dtype) for grad in grad_rows)
