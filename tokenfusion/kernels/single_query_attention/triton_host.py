"""Launches of single_query_attention's Triton kernels: tiles, splits over the tokens, outputs and partial sums."""

import functools

import torch
import triton

from tokenfusion.kernels.single_query_attention import triton_kernels, triton_wide_kernels
from tokenfusion.kernels.single_query_attention.shapes import empty_gradients, statistics_dtype

PROGRAMS_PER_MULTIPROCESSOR = {"": 2, "split": 6}  # by form
MAX_SPLITS = 32
MAX_CHANNELS_ON_CHIP = 1024  # whose sums one program holds
_CHUNKS_ENOUGH = 8
_MULTIPROCESSORS_ELSEWHERE = 132
_WIDE = dict(BC=128, BN=32, BQ=16, num_warps=4, num_stages=2)


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
    """The power of two from widest / 8 (at least 16) to `widest` that pads C least; of equals the widest.

    Kernels unroll the chunks, and take minutes to compile where more than a few are padded less.
    """
    widths = [width for width in (16, 32, 64, 128, 256) if widest <= 8 * width and width <= widest]
    widths = [width for width in widths if channels <= _CHUNKS_ENOUGH * width] or [widest]
    return min(widths, key=lambda width: (triton.cdiv(channels, width) * width, -width))


def _splits(batch: int, blocks: int, device: torch.device, form: str = "") -> tuple[int, int]:
    """How many programs share an image's token blocks, and how many blocks each takes; none is left without one."""
    wanted = PROGRAMS_PER_MULTIPROCESSOR[form] * _multiprocessors(device) // batch
    blocks_per_split = triton.cdiv(blocks, max(1, min(wanted, MAX_SPLITS, blocks)))
    return triton.cdiv(blocks, blocks_per_split), blocks_per_split


def _layout(query, tokens, extra_token, lengths, offsets):
    """Where the operands' elements are, as arguments and options that kernels share."""
    pointers = tokens.data_ptr(), 0 if extra_token is None else extra_token.data_ptr()
    aligned = all(stride % 8 == 0 for stride in tokens.stride()[:2]) and all(p % 16 == 0 for p in pointers)
    stride_unit = 8 if aligned else 1
    return dict(
        N=tokens.shape[1],
        Q=query.shape[1],
        stride_tb=tokens.stride(0) // stride_unit if offsets is None else 0,
        stride_tn=tokens.stride(1) // stride_unit,
        C=tokens.shape[2],
        STRIDE_UNIT=stride_unit,
        HAS_EXTRA=int(extra_token is not None),
        HAS_LENGTHS=lengths is not None,
        HAS_OFFSETS=offsets is not None,
    )


def _plan(query, tokens, extra_token, lengths, offsets, normalize, eps, backward, form=""):
    """(splits, arguments and options that forward_kernel and backward_kernel share)."""
    layout = _layout(query, tokens, extra_token, lengths, offsets)
    channels, rows = layout["C"], layout["N"] + layout["HAS_EXTRA"]
    widest, block_n, num_warps, num_stages = _tile(channels, tokens.element_size(), backward)
    splits, blocks_per_split = _splits(query.shape[0], triton.cdiv(max(1, rows), block_n), tokens.device, form)
    return splits, layout | dict(
        rows_per_split=blocks_per_split * block_n,
        eps=eps,
        BC=_chunk(channels, widest),
        BN=block_n,
        BQ=_query_block(query.shape[1], channels),
        NORMALIZE=normalize,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _combine(partial, partial_log_sum_exp, out, log_sum_exp):
    """Sum the splits' partial results in a fixed order; weighted by their log-sum-exp where given."""
    batch, splits, queries, channels = partial.shape
    block_c = 128
    triton_kernels.combine_kernel[batch * queries, triton.cdiv(channels, block_c)](
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


def run_forward(query, tokens, extra_token, lengths, offsets, normalize, eps, form=""):
    batch, queries, channels = query.shape
    query = query.contiguous()
    extra_token = None if extra_token is None else extra_token.contiguous()
    context = torch.empty_like(query)
    log_sum_exp = query.new_empty(batch, queries, dtype=statistics_dtype(tokens))
    if query.numel() == 0:
        return context, log_sum_exp
    if channels > MAX_CHANNELS_ON_CHIP:
        wide = _Wide(query, tokens, extra_token, lengths, offsets, normalize, eps, form)
        wide.log_sum_exp(log_sum_exp)
        wide.sum(context, log_sum_exp)
        return context, log_sum_exp
    splits, plan = _plan(query, tokens, extra_token, lengths, offsets, normalize, eps, backward=False, form=form)
    outputs = context, log_sum_exp
    if splits > 1:
        outputs = (
            query.new_empty(batch, splits, queries, channels, dtype=torch.float32),
            query.new_empty(batch, splits, queries, dtype=torch.float32),
        )
    with torch.cuda.device_of(tokens):
        triton_kernels.forward_kernel[batch * triton.cdiv(queries, plan["BQ"]), splits](
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
    grad_context, query, tokens, extra_token, lengths, offsets, context, log_sum_exp, normalize, eps, needed, form=""
):
    batch, queries, channels = query.shape
    grads = empty_gradients(query, tokens, extra_token, needed)
    if query.numel() == 0:
        return tuple(grad.zero_() for grad in grads)
    if channels > MAX_CHANNELS_ON_CHIP:
        wide = _Wide(query, tokens, extra_token, lengths, offsets, normalize, eps, form)
        wide.gradients(grad_context.contiguous(), context.contiguous(), log_sum_exp.contiguous(), *grads, needed)
        return grads
    splits, plan = _plan(query, tokens, extra_token, lengths, offsets, normalize, eps, backward=True, form=form)
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


class _Wide:
    """A call with more channels than one program holds the sums of: its scores, and what is made of them."""

    def __init__(self, query, tokens, extra_token, lengths, offsets, normalize, eps, form):
        self.query, self.tokens, self.eps = query.contiguous(), tokens, eps
        self.layout = _layout(query, tokens, extra_token, lengths, offsets)
        self.extra_token = tokens if extra_token is None else extra_token.contiguous()
        self.bags = tuple(tokens if each is None else each.contiguous() for each in (lengths, offsets))
        rows = self.layout["N"] + self.layout["HAS_EXTRA"]
        self.batch = query.shape[0]
        self.splits, _ = _splits(self.batch, triton.cdiv(max(1, rows), _WIDE["BN"]), tokens.device, form)
        total = tokens.shape[0] * tokens.shape[1] + self.batch * self.layout["HAS_EXTRA"]
        self.scores = query.new_empty(total, query.shape[1], dtype=torch.float32)
        self.normalize = dict(NORMALIZE=normalize)
        self.statistics = tuple(query.new_empty(total if normalize else 0, dtype=torch.float32) for _ in range(2))
        self._write_scores(self.query, self.scores)

    def _write_scores(self, query, out):
        blocks = triton.cdiv(query.shape[1], _WIDE["BQ"])
        with torch.cuda.device_of(self.tokens):
            triton_wide_kernels.scores_kernel[self.batch * blocks, self.splits](
                query,
                self.tokens,
                self.extra_token,
                *self.bags,
                out,
                *self.statistics,
                eps=self.eps,
                **self.layout,
                **self.normalize,
                **_WIDE,
            )

    def log_sum_exp(self, out):
        names = ("N", "Q", "HAS_EXTRA", "HAS_LENGTHS", "HAS_OFFSETS")
        block_q = _WIDE["BQ"]
        with torch.cuda.device_of(self.tokens):
            triton_wide_kernels.log_sum_exp_kernel[(self.batch * triton.cdiv(self.query.shape[1], block_q),)](
                self.scores,
                *self.bags,
                out,
                **{name: self.layout[name] for name in names},
                BN=256,
                BQ=block_q,
            )

    def sum(self, out, log_sum_exp, backward=None):
        """Of the tokens, with their weights or, where backward is (grad_weights, delta, context), their gradients."""
        channels, queries = self.layout["C"], self.query.shape[1]
        blocks = triton.cdiv(queries, _WIDE["BQ"]) * triton.cdiv(channels, _WIDE["BC"])
        partial = out
        if self.splits > 1:
            partial = out.new_empty(self.batch, self.splits, queries, channels, dtype=torch.float32)
        grad_weights, delta, context = backward or (self.scores,) * 3
        with torch.cuda.device_of(self.tokens):
            triton_wide_kernels.sum_kernel[self.batch * blocks, self.splits](
                self.scores,
                grad_weights,
                log_sum_exp,
                delta,
                context,
                self.tokens,
                self.extra_token,
                *self.bags,
                *self.statistics,
                partial,
                **self.layout,
                **self.normalize,
                **_WIDE,
                BACKWARD=backward is not None,
            )
            if partial is not out:
                _combine(partial, None, out, None)

    def gradients(self, grad_context, context, log_sum_exp, grad_query, grad_tokens, grad_extra_token, needed):
        grad_weights = torch.empty_like(self.scores)
        self._write_scores(grad_context, grad_weights)
        delta = (grad_context.float() * context.float()).sum(-1)
        if needed[0]:
            self.sum(grad_query, log_sum_exp, (grad_weights, delta, context))
        if not needed[1] and not needed[2]:
            return
        if self.layout["HAS_LENGTHS"] or self.layout["HAS_OFFSETS"]:
            grad_tokens.zero_()  # of what takes no part
        tiles = _WIDE | dict(BC=64, num_stages=1)  # more would spill
        blocks = triton.cdiv(self.layout["C"], tiles["BC"])
        with torch.cuda.device_of(self.tokens):
            triton_wide_kernels.token_gradients_kernel[self.batch * blocks, self.splits](
                self.scores,
                grad_weights,
                log_sum_exp,
                delta,
                self.query,
                grad_context,
                self.query.float().sum(-1),
                grad_context.float().sum(-1),
                self.tokens,
                self.extra_token,
                *self.bags,
                *self.statistics,
                grad_tokens,
                grad_extra_token,
                **self.layout,
                **self.normalize,
                **tiles,
                NEED_TOKENS=needed[1],
                NEED_EXTRA=needed[2],
            )
