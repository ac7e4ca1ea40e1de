"""Triton kernels of single_query_attention for more channels than fit on chip: BC of them at a time.

The scores are written, [rows, Q] of all images one after the other, and the tokens are read once for them and once for
their sum. A row is a token, or an image's extra token, which comes before its others.
"""

import triton
import triton.language as tl

from tokenfusion.kernels.single_query_attention.triton_kernels import (
    _bag,
    _row_pointers,
    add_scores,
    inverse_root,
    split_program,
)


@triton.jit
def _share(
    lengths, offsets, i_b, N,
    BN: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    # (the image's first token and its first row, how many rows it has, where this program's begin and end)
    i_t, count = _bag(lengths, offsets, i_b, N, HAS_LENGTHS, HAS_OFFSETS)
    rows = count + HAS_EXTRA
    each = tl.cdiv(tl.cdiv(rows, tl.num_programs(1)), BN) * BN
    start = tl.program_id(1) * each
    return i_t, i_t + i_b * HAS_EXTRA, rows, start, tl.minimum(start + each, rows)


@triton.jit
def _load_chunk(p_t, m_n, i_c, C: tl.constexpr, BC: tl.constexpr):
    # [BN, BC]
    o_c = i_c + tl.arange(0, BC)
    return tl.load(p_t[:, None] + o_c[None, :], mask=m_n[:, None] & (o_c < C)[None, :], other=0.0)


@triton.jit
def _normalized(b_t, b_mean, b_rstd):
    return ((b_t.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None]).to(b_t.dtype)


@triton.jit
def _load_queries(query, i_b, o_q, i_c, Q, C: tl.constexpr, BC: tl.constexpr):
    # [BQ, BC]
    o_c = i_c + tl.arange(0, BC)
    m_qc = (o_q < Q)[:, None] & (o_c < C)[None, :]
    return tl.load(query + (i_b * Q + o_q)[:, None] * C + o_c[None, :], mask=m_qc, other=0.0)


@triton.jit
def _statistics(p_t, m_n, eps, C: tl.constexpr, BC: tl.constexpr):
    b_mean = tl.zeros([p_t.shape[0]], tl.float32)
    for i_c in range(0, C, BC):
        b_mean += tl.sum(_load_chunk(p_t, m_n, i_c, C, BC).to(tl.float32), 1)
    b_mean *= 1.0 / C
    b_shift = tl.zeros_like(b_mean)
    b_var = tl.zeros_like(b_mean)
    for i_c in range(0, C, BC):
        b_t = _load_chunk(p_t, m_n, i_c, C, BC).to(tl.float32)
        b_d = tl.where((i_c + tl.arange(0, BC) < C)[None, :], b_t - b_mean[:, None], 0.0)
        b_shift += tl.sum(b_d, 1)
        b_var += tl.sum(b_d * b_d, 1)
    b_shift *= 1.0 / C
    b_var = b_var * (1.0 / C) - b_shift * b_shift
    is_exact: tl.constexpr = p_t.dtype.element_ty == tl.float32
    return b_mean + b_shift, tl.where(m_n, inverse_root(b_var + eps, is_exact), 0.0)


@triton.jit(do_not_specialize=["N", "Q", "stride_tb", "stride_tn"])
def scores_kernel(
    query, tokens, extra_token, lengths, offsets, scores, mean, rstd,
    N, Q, stride_tb, stride_tn, eps,
    C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    i_b, i_q = split_program(tl.cdiv(Q, BQ))
    i_t, i_r, rows, start, end = _share(lengths, offsets, i_b, N, BN, HAS_EXTRA, HAS_LENGTHS, HAS_OFFSETS)
    tokens += i_b * stride_tb * STRIDE_UNIT
    if HAS_OFFSETS:
        tokens += i_t * stride_tn * STRIDE_UNIT
    extra_token += i_b * C
    o_q = i_q * BQ + tl.arange(0, BQ)
    for i_n in range(start, end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < rows
        p_t = _row_pointers(tokens, extra_token, o_n, stride_tn, STRIDE_UNIT, HAS_EXTRA)
        if NORMALIZE:
            b_mean, b_rstd = _statistics(p_t, m_n, eps, C, BC)
            tl.store(mean + i_r + o_n, b_mean, mask=m_n)
            tl.store(rstd + i_r + o_n, b_rstd, mask=m_n)
        b_s = tl.zeros([BN, BQ], tl.float32)
        for i_c in range(0, C, BC):
            b_n = _load_chunk(p_t, m_n, i_c, C, BC)
            if NORMALIZE:
                b_n = _normalized(b_n, b_mean, b_rstd)
            b_q = _load_queries(query, i_b, o_q, i_c, Q, C, BC)
            b_s = add_scores(b_s, b_n, tl.trans(b_q), m_n)
        m_nq = m_n[:, None] & (o_q < Q)[None, :]
        tl.store(scores + (i_r + o_n)[:, None] * Q + o_q[None, :], b_s, mask=m_nq)


@triton.jit(do_not_specialize=["N", "Q"])
def log_sum_exp_kernel(
    scores, lengths, offsets, log_sum_exp, N, Q,
    BN: tl.constexpr, BQ: tl.constexpr,
    HAS_EXTRA: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
):  # fmt: skip
    i_b, i_q = split_program(tl.cdiv(Q, BQ))
    _, i_r, rows, _, _ = _share(lengths, offsets, i_b, N, BN, HAS_EXTRA, HAS_LENGTHS, HAS_OFFSETS)
    o_q = i_q * BQ + tl.arange(0, BQ)
    m_q = o_q < Q
    b_max = tl.full([BQ], float("-inf"), tl.float32)
    b_sum = tl.zeros([BQ], tl.float32)
    for i_n in range(0, rows, BN):
        o_n = i_n + tl.arange(0, BN)
        m_nq = (o_n < rows)[:, None] & m_q[None, :]
        b_s = tl.load(scores + (i_r + o_n)[:, None] * Q + o_q[None, :], mask=m_nq, other=float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 0))
        b_origin = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_origin) + tl.sum(tl.exp(b_s - b_origin[None, :]), 0)
        b_max = b_new
    tl.store(log_sum_exp + i_b * Q + o_q, b_max + tl.log(b_sum), mask=m_q)


@triton.jit
def _load_weights(scores, grad_weights, log_sum_exp, delta, i_b, i_r, o_n, o_q, m_n, Q, BACKWARD: tl.constexpr):
    # [BN, BQ] each: the weights, and in the backward pass the scores, the gradients of weights and of scores
    m_q = o_q < Q
    m_nq = m_n[:, None] & m_q[None, :]
    o_nq = (i_r + o_n)[:, None] * Q + o_q[None, :]
    b_s = tl.load(scores + o_nq, mask=m_nq, other=0.0)
    b_lse = tl.load(log_sum_exp + i_b * Q + o_q, mask=m_q, other=0.0)
    b_p = tl.where(m_nq, tl.exp(b_s - b_lse[None, :]), 0.0)
    b_dp = b_p
    b_ds = b_p
    if BACKWARD:
        b_dp = tl.load(grad_weights + o_nq, mask=m_nq, other=0.0)
        b_ds = b_p * (b_dp - tl.load(delta + i_b * Q + o_q, mask=m_q, other=0.0)[None, :])
    return b_p, b_s, b_dp, b_ds


@triton.jit(do_not_specialize=["N", "Q", "stride_tb", "stride_tn"])
def sum_kernel(
    scores, grad_weights, log_sum_exp, delta, context, tokens, extra_token, lengths, offsets, mean, rstd, out,
    N, Q, stride_tb, stride_tn,
    C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    NORMALIZE: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    blocks_c: tl.constexpr = (C + BC - 1) // BC
    i_b, i_qc = split_program(tl.cdiv(Q, BQ) * blocks_c)
    i_s = tl.program_id(1)
    i_t, i_r, rows, start, end = _share(lengths, offsets, i_b, N, BN, HAS_EXTRA, HAS_LENGTHS, HAS_OFFSETS)
    tokens += i_b * stride_tb * STRIDE_UNIT
    if HAS_OFFSETS:
        tokens += i_t * stride_tn * STRIDE_UNIT
    extra_token += i_b * C
    i_c = i_qc % blocks_c * BC
    o_q = i_qc // blocks_c * BQ + tl.arange(0, BQ)
    b_o = tl.zeros([BQ, BC], tl.float32)
    b_excess = tl.zeros([BQ], tl.float32)
    for i_n in range(start, end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < rows
        p_t = _row_pointers(tokens, extra_token, o_n, stride_tn, STRIDE_UNIT, HAS_EXTRA)
        b_n = _load_chunk(p_t, m_n, i_c, C, BC)
        if NORMALIZE:
            b_mean = tl.load(mean + i_r + o_n, mask=m_n, other=0.0)
            b_n = _normalized(b_n, b_mean, tl.load(rstd + i_r + o_n, mask=m_n, other=0.0))
        _, _, _, b_w = _load_weights(scores, grad_weights, log_sum_exp, delta, i_b, i_r, o_n, o_q, m_n, Q, BACKWARD)
        b_w = b_w.to(b_n.dtype)
        b_o = tl.dot(tl.trans(b_w), b_n, b_o, input_precision="ieee")
        b_excess += tl.sum(b_w.to(tl.float32), 0)
    o_c = i_c + tl.arange(0, BC)
    m_qc = (o_q < Q)[:, None] & (o_c < C)[None, :]
    if BACKWARD:
        # sum ds = 0 but for rounding, whose share of dq goes here
        b_o -= b_excess[:, None] * _load_queries(context, i_b, o_q, i_c, Q, C, BC).to(tl.float32)
    i_o = (i_b * tl.num_programs(1) + i_s) * Q + o_q
    tl.store(out + i_o[:, None] * C + o_c[None, :], b_o.to(out.dtype.element_ty), mask=m_qc)


@triton.jit(do_not_specialize=["N", "Q", "stride_tb", "stride_tn"])
def token_gradients_kernel(
    scores, grad_weights, log_sum_exp, delta, query, grad_context, query_sum, grad_sum,
    tokens, extra_token, lengths, offsets, mean, rstd, grad_tokens, grad_extra_token,
    N, Q, stride_tb, stride_tn,
    C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    NORMALIZE: tl.constexpr, NEED_TOKENS: tl.constexpr, NEED_EXTRA: tl.constexpr,
):  # fmt: skip
    i_b, i_c = split_program((C + BC - 1) // BC)
    i_t, i_r, rows, start, end = _share(lengths, offsets, i_b, N, BN, HAS_EXTRA, HAS_LENGTHS, HAS_OFFSETS)
    tokens += i_b * stride_tb * STRIDE_UNIT
    if HAS_OFFSETS:
        tokens += i_t * stride_tn * STRIDE_UNIT
    grad_tokens += i_t * C
    extra_token += i_b * C
    grad_extra_token += i_b * C
    i_c *= BC
    o_c = i_c + tl.arange(0, BC)
    if not NEED_TOKENS:
        end = tl.minimum(end, HAS_EXTRA)
    for i_n in range(start, end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < rows
        b_d = tl.zeros([BN, BC], tl.float32)
        b_e = tl.zeros([BN, BC], tl.float32)  # two products of one loop into one accumulator are wrong on tcgen05
        b_sum = tl.zeros([BN], tl.float32)
        b_slope = tl.zeros([BN], tl.float32)
        for i_q in range(0, Q, BQ):
            o_q = i_q + tl.arange(0, BQ)
            b_p, b_s, b_dp, b_ds = _load_weights(
                scores, grad_weights, log_sum_exp, delta, i_b, i_r, o_n, o_q, m_n, Q, True
            )
            b_g = _load_queries(grad_context, i_b, o_q, i_c, Q, C, BC)
            b_q = _load_queries(query, i_b, o_q, i_c, Q, C, BC)
            # [BN, BQ] @ [BQ, BC] -> [BN, BC]
            b_d = tl.dot(b_p.to(b_g.dtype), b_g, b_d, input_precision="ieee")
            b_e = tl.dot(b_ds.to(b_q.dtype), b_q, b_e, input_precision="ieee")
            if NORMALIZE:
                b_g_sum = tl.load(grad_sum + i_b * Q + o_q, mask=o_q < Q, other=0.0)
                b_q_sum = tl.load(query_sum + i_b * Q + o_q, mask=o_q < Q, other=0.0)
                b_sum += tl.sum(b_p * b_g_sum[None, :] + b_ds * b_q_sum[None, :], 1)
                b_slope += tl.sum(b_p * b_dp + b_ds * b_s, 1)
        b_d += b_e
        if NORMALIZE:
            p_t = _row_pointers(tokens, extra_token, o_n, stride_tn, STRIDE_UNIT, HAS_EXTRA)
            b_mean = tl.load(mean + i_r + o_n, mask=m_n, other=0.0)
            b_rstd = tl.load(rstd + i_r + o_n, mask=m_n, other=0.0)
            b_n = _normalized(_load_chunk(p_t, m_n, i_c, C, BC), b_mean, b_rstd).to(tl.float32)
            b_d = b_rstd[:, None] * (b_d - (b_sum[:, None] + b_n * b_slope[:, None]) * (1.0 / C))
        p_d = _row_pointers(grad_tokens, grad_extra_token, o_n, C // 8, 8, HAS_EXTRA)
        m_d = m_n
        if not NEED_TOKENS:
            m_d = m_d & (o_n < HAS_EXTRA)
        if not NEED_EXTRA:
            m_d = m_d & (o_n >= HAS_EXTRA)
        m_dc = m_d[:, None] & (o_c < C)[None, :]
        tl.store(p_d[:, None] + o_c[None, :], b_d.to(grad_tokens.dtype.element_ty), mask=m_dc)
