"""Triton kernels of single_query_attention. The C channels are cut into K chunks of BC, held as tuples of blocks.

Images and blocks of queries lie along the first axis of programs, which alone may be longer than 65535; the blocks of
an image, which read the same tokens, one after the other.
"""

import triton
import triton.language as tl


@triton.jit
def split_program(blocks):
    # (number of the image, number of this program among its blocks)
    i = tl.program_id(0).to(tl.int64)
    return i // blocks, i % blocks


@triton.jit
def _load_queries(p_q, o_q, m_q, C: tl.constexpr, BC: tl.constexpr):
    # K x [BC, BQ]
    b_q = ()
    for i_c in tl.static_range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_cq = (o_c < C)[:, None] & m_q[None, :]
        b_q = b_q + (tl.load(p_q + o_q[None, :] * C + o_c[:, None], mask=m_cq, other=0.0),)
    return b_q


@triton.jit
def _store_queries(p_q, b_q, o_q, m_q, C: tl.constexpr, BC: tl.constexpr):
    for i in tl.static_range(len(b_q)):
        o_c = i * BC + tl.arange(0, BC)
        m_cq = (o_c < C)[:, None] & m_q[None, :]
        tl.store(p_q + o_q[None, :] * C + o_c[:, None], b_q[i].to(p_q.dtype.element_ty), mask=m_cq)


@triton.jit
def _zeros(C: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr):
    b_z = ()
    for _ in tl.static_range(0, C, BC):
        b_z = b_z + (tl.zeros([BC, BQ], tl.float32),)
    return b_z


@triton.jit
def _load_tokens(p_t, m_n, C: tl.constexpr, BC: tl.constexpr):
    # K x [BN, BC]
    b_t = ()
    for i_c in tl.static_range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_nc = m_n[:, None] & (o_c < C)[None, :]
        b_t = b_t + (tl.load(p_t[:, None] + o_c[None, :], mask=m_nc, other=0.0),)
    return b_t


@triton.jit
def _center(b_t, b_mean, i_c, C: tl.constexpr):
    o_c = i_c + tl.arange(0, b_t.shape[1])
    return tl.where((o_c < C)[None, :], b_t.to(tl.float32) - b_mean[:, None], 0.0)


@triton.jit
def inverse_root(b_x, EXACT: tl.constexpr):
    b_r = tl.rsqrt(b_x)
    if EXACT:
        b_r += 0.5 * b_r * tl.fma(-b_x * b_r, b_r, 1.0)  # a step of Newton's method
    return b_r


@triton.jit
def _normalize(b_t, m_n, eps, C: tl.constexpr, BC: tl.constexpr):
    b_mean = tl.sum(b_t[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(b_t)):
        b_mean += tl.sum(b_t[i].to(tl.float32), 1)
    b_mean *= 1.0 / C
    b_shift = tl.zeros_like(b_mean)
    b_var = tl.zeros_like(b_mean)
    for i in tl.static_range(len(b_t)):
        b_d = _center(b_t[i], b_mean, i * BC, C)
        b_shift += tl.sum(b_d, 1)
        b_var += tl.sum(b_d * b_d, 1)
    b_shift *= 1.0 / C
    b_mean += b_shift
    b_var = b_var * (1.0 / C) - b_shift * b_shift
    b_rstd = tl.where(m_n, inverse_root(b_var + eps, b_t[0].dtype == tl.float32), 0.0)
    b_n = ()
    for i in tl.static_range(len(b_t)):
        b_d = _center(b_t[i], b_mean, i * BC, C)
        b_n = b_n + ((b_d * b_rstd[:, None]).to(b_t[i].dtype),)
    return b_n, b_rstd


@triton.jit
def add_scores(b_s, b_n, b_q, m_n):
    # [BN, BQ] + [BN, BC] @ [BC, BQ]
    if b_n.dtype == tl.float32:
        # a sum of its own for each chunk of the channels: one of all of them would be less exact than eager's;
        # the choice keeps Triton from making one
        return b_s + tl.where(m_n[:, None], tl.dot(b_n, b_q, input_precision="ieee"), 0.0)
    return tl.dot(b_n, b_q, b_s, input_precision="ieee")


@triton.jit
def _dot_queries(b_n, b_q, m_n):
    # K x [BN, BC] @ [BC, BQ] -> [BN, BQ]
    b_s = tl.zeros([b_n[0].shape[0], b_q[0].shape[1]], tl.float32)
    for i in tl.static_range(len(b_n)):
        b_s = add_scores(b_s, b_n[i], b_q[i], m_n)
    return b_s


@triton.jit
def _sum_tokens(b_sum, b_n, b_p):
    # K x [BC, BQ] + [BC, BN] @ [BN, BQ]
    b_new = ()
    for i in tl.static_range(len(b_n)):
        b_new = b_new + (tl.dot(tl.trans(b_n[i]), b_p.to(b_n[i].dtype), b_sum[i], input_precision="ieee"),)
    return b_new


@triton.jit
def _scale(b_sum, b_scale):
    b_new = ()
    for i in tl.static_range(len(b_sum)):
        b_new = b_new + (b_sum[i] * b_scale[None, :],)
    return b_new


@triton.jit
def _row_pointers(tokens, extra_token, o_n, stride_n, STRIDE_UNIT: tl.constexpr, HAS_EXTRA: tl.constexpr):
    # the extra token is row 0
    p_t = tokens + (o_n - HAS_EXTRA).to(tl.int64) * stride_n * STRIDE_UNIT
    if HAS_EXTRA:
        p_t = tl.where(o_n == 0, extra_token, p_t)
        if STRIDE_UNIT == 8:
            p_t = tl.multiple_of(p_t, 16)  # bytes; the choice hides it from Triton 3.9
    return p_t


@triton.jit
def _clamp(i, low, high):
    return tl.minimum(tl.maximum(i, low), high)


@triton.jit
def _bag(lengths, offsets, i_b, N, HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr):
    # (number of the first token among those of all images in a row, how many)
    i_t = i_b * N
    if HAS_OFFSETS:
        i_t = _clamp(tl.load(offsets + i_b), 0, N)
        N = _clamp(tl.load(offsets + i_b + 1), i_t, N) - i_t
    if HAS_LENGTHS:
        N = _clamp(tl.load(lengths + i_b), 0, N)
    return i_t.to(tl.int64), N.to(tl.int32)


@triton.jit(do_not_specialize=["N", "Q", "rows_per_split", "stride_tb", "stride_tn"])
def forward_kernel(
    query, tokens, extra_token, lengths, offsets, context, log_sum_exp,
    N, Q, rows_per_split, stride_tb, stride_tn, eps,
    C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    i_b, i_q = split_program(tl.cdiv(Q, BQ))
    i_s = tl.program_id(1)
    tokens += i_b * stride_tb * STRIDE_UNIT
    extra_token += i_b * C
    o_q = i_q * BQ + tl.arange(0, BQ)
    m_q = o_q < Q

    b_q = _load_queries(query + i_b * Q * C, o_q, m_q, C, BC)
    b_max = tl.full([BQ], float("-inf"), tl.float32)
    b_sum = tl.zeros([BN, BQ], tl.float32)
    b_c = _zeros(C, BC, BQ)
    i_t, count = _bag(lengths, offsets, i_b, N, HAS_LENGTHS, HAS_OFFSETS)
    rows = count + HAS_EXTRA
    if HAS_OFFSETS:
        tokens += i_t * stride_tn * STRIDE_UNIT
        rows_per_split = tl.cdiv(tl.cdiv(rows, tl.num_programs(1)), BN) * BN  # the host knows no bag's
    end = rows_per_split
    if HAS_LENGTHS or HAS_OFFSETS:
        end = tl.minimum(end, rows - i_s * rows_per_split)
    for i_n in range(0, end, BN):
        o_n = i_s * rows_per_split + i_n + tl.arange(0, BN)
        m_n = o_n < rows
        p_t = _row_pointers(tokens, extra_token, o_n, stride_tn, STRIDE_UNIT, HAS_EXTRA)
        b_n = _load_tokens(p_t, m_n, C, BC)
        if NORMALIZE:
            b_n, _ = _normalize(b_n, m_n, eps, C, BC)
        b_s = tl.where(m_n[:, None], _dot_queries(b_n, b_q, m_n), float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 0))
        b_scale = tl.exp(b_max - b_new)
        b_p = tl.exp(b_s - b_new[None, :])
        b_sum = b_sum * b_scale[None, :] + b_p
        b_c = _sum_tokens(_scale(b_c, b_scale), b_n, b_p)
        b_max = b_new

    b_sum = tl.sum(b_sum, 0)
    if HAS_LENGTHS or HAS_OFFSETS:
        b_sum = tl.where(end > 0, b_sum, 1.0)  # the context of no row is 0
    i_o = i_b * tl.num_programs(1) + i_s
    tl.store(log_sum_exp + i_o * Q + o_q, b_max + tl.log(b_sum), mask=m_q)
    _store_queries(context + i_o * Q * C, _scale(b_c, 1.0 / b_sum), o_q, m_q, C, BC)


@triton.jit(do_not_specialize=["first_query", "N", "Q", "rows_per_split", "stride_tb", "stride_tn"])
def backward_kernel(
    grad_context, query, tokens, extra_token, lengths, offsets, context, log_sum_exp,
    grad_query, grad_tokens, grad_extra_token,
    first_query, N, Q, rows_per_split, stride_tb, stride_tn, eps,
    C: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr,
    STRIDE_UNIT: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_OFFSETS: tl.constexpr,
    NORMALIZE: tl.constexpr, NEED_QUERY: tl.constexpr, NEED_TOKENS: tl.constexpr, NEED_EXTRA: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    i_b, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tokens += i_b * stride_tb * STRIDE_UNIT
    extra_token += i_b * C
    grad_extra_token += i_b * C
    o_q = (first_query + tl.arange(0, BQ)).to(tl.int64)
    m_q = o_q < Q

    b_q = _load_queries(query + i_b * Q * C, o_q, m_q, C, BC)
    b_g = _load_queries(grad_context + i_b * Q * C, o_q, m_q, C, BC)
    b_o = _load_queries(context + i_b * Q * C, o_q, m_q, C, BC)
    b_lse = tl.load(log_sum_exp + i_b * Q + o_q, mask=m_q, other=0.0)
    b_delta = tl.zeros([BQ], tl.float32)
    b_q_sum = tl.zeros([BQ], tl.float32)
    b_g_sum = tl.zeros([BQ], tl.float32)
    for i in tl.static_range(len(b_q)):
        b_delta += tl.sum(b_g[i].to(tl.float32) * b_o[i].to(tl.float32), 0)
        b_q_sum += tl.sum(b_q[i].to(tl.float32), 0)
        b_g_sum += tl.sum(b_g[i].to(tl.float32), 0)

    b_dq = _zeros(C, BC, BQ)
    b_excess = tl.zeros([BN, BQ], tl.float32)
    i_t, count = _bag(lengths, offsets, i_b, N, HAS_LENGTHS, HAS_OFFSETS)
    grad_tokens += i_t * C
    rows = count + HAS_EXTRA
    if HAS_OFFSETS:
        tokens += i_t * stride_tn * STRIDE_UNIT
        rows_per_split = tl.cdiv(tl.cdiv(rows, tl.num_programs(1)), BN) * BN
    end = rows_per_split
    # beyond the rows of a padded bag are gradients of zero to be written
    if HAS_OFFSETS or (HAS_LENGTHS and not NEED_TOKENS):
        end = tl.minimum(end, rows - i_s * rows_per_split)
    # hoisted addresses of the queries' shared memory would spill
    for i_n in tl.range(0, end, BN, disable_licm=True):
        o_n = i_s * rows_per_split + i_n + tl.arange(0, BN)
        m_n = o_n < rows
        p_t = _row_pointers(tokens, extra_token, o_n, stride_tn, STRIDE_UNIT, HAS_EXTRA)
        b_n = _load_tokens(p_t, m_n, C, BC)
        if NORMALIZE:
            b_n, b_rstd = _normalize(b_n, m_n, eps, C, BC)
        b_s = tl.zeros([BN, BQ], tl.float32)
        b_dp = tl.zeros([BN, BQ], tl.float32)
        for i in tl.static_range(len(b_n)):
            b_s = add_scores(b_s, b_n[i], b_q[i], m_n)
            b_dp = add_scores(b_dp, b_n[i], b_g[i], m_n)
        b_p = tl.where(m_n[:, None] & m_q[None, :], tl.exp(b_s - b_lse[None, :]), 0.0)
        b_ds = b_p * (b_dp - b_delta[None, :])
        if NEED_QUERY:
            b_dq = _sum_tokens(b_dq, b_n, b_ds)
            b_excess += b_ds.to(b_q[0].dtype).to(tl.float32)
        if NEED_TOKENS or NEED_EXTRA:
            p_d = _row_pointers(grad_tokens, grad_extra_token, o_n, C // 8, 8, HAS_EXTRA)
            m_d = m_n if HAS_OFFSETS else o_n < N + HAS_EXTRA
            if not NEED_TOKENS:
                m_d = m_d & (o_n < HAS_EXTRA)
            if not NEED_EXTRA:
                m_d = m_d & (o_n >= HAS_EXTRA)
            if NORMALIZE:
                b_mean = tl.sum(b_p * b_g_sum[None, :] + b_ds * b_q_sum[None, :], 1) * (1.0 / C)
                b_slope = tl.sum(b_p * b_dp + b_ds * b_s, 1) * (1.0 / C)
            for i in tl.static_range(len(b_n)):
                o_c = i * BC + tl.arange(0, BC)
                # [BN, BQ] @ [BQ, BC] -> [BN, BC]
                b_d = tl.dot(b_p.to(b_g[i].dtype), tl.trans(b_g[i]), input_precision="ieee")
                b_d = tl.dot(b_ds.to(b_q[i].dtype), tl.trans(b_q[i]), b_d, input_precision="ieee")
                if NORMALIZE:
                    b_d = b_rstd[:, None] * (b_d - b_mean[:, None] - b_n[i].to(tl.float32) * b_slope[:, None])
                if HAS_LENGTHS and not HAS_OFFSETS:
                    b_d = tl.where(m_n[:, None], b_d, 0.0)
                m_dc = m_d[:, None] & (o_c < C)[None, :]
                if ADD:
                    b_d += tl.load(p_d[:, None] + o_c[None, :], mask=m_dc, other=0.0)
                tl.store(p_d[:, None] + o_c[None, :], b_d.to(grad_tokens.dtype.element_ty), mask=m_dc)

    if NEED_QUERY:
        i_o = i_b * tl.num_programs(1) + i_s
        b_excess = tl.sum(b_excess, 0)
        for i in tl.static_range(len(b_dq)):
            o_c = i * BC + tl.arange(0, BC)
            m_cq = (o_c < C)[:, None] & m_q[None, :]
            o_cq = o_q[None, :] * C + o_c[:, None]
            b_c = tl.load(context + i_b * Q * C + o_cq, mask=m_cq, other=0.0).to(tl.float32)
            # sum ds = 0 but for rounding, whose share of dq goes here
            b_o = b_dq[i] - b_c * b_excess[None, :]
            tl.store(grad_query + i_o * Q * C + o_cq, b_o.to(grad_query.dtype.element_ty), mask=m_cq)


@triton.jit(do_not_specialize=["S", "Q"])
def combine_kernel(
    partial, partial_log_sum_exp, out, log_sum_exp, S, Q,
    C: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    i_b, i_q = split_program(Q)
    i_c = tl.program_id(1)
    o_s = tl.arange(0, BS)
    o_c = i_c * BC + tl.arange(0, BC)
    m_s = o_s < S
    m_c = o_c < C
    o_p = (i_b * S + o_s) * Q + i_q
    b_p = tl.load(partial + o_p[:, None] * C + o_c[None, :], mask=m_s[:, None] & m_c[None, :], other=0.0)
    if WEIGHTED:
        b_l = tl.load(partial_log_sum_exp + o_p, mask=m_s, other=float("-inf"))
        b_max = tl.max(b_l, 0)
        b_w = tl.exp(b_l - tl.where(b_max == float("-inf"), 0.0, b_max))
        b_sum = tl.sum(b_w, 0)
        b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # of no split with a row
        b_p *= b_w[:, None] / b_sum
        if i_c == 0:
            tl.store(log_sum_exp + i_b * Q + i_q, b_max + tl.log(b_sum))
    b_o = tl.sum(b_p, 0)
    tl.store(out + (i_b * Q + i_q) * C + o_c, b_o.to(out.dtype.element_ty), mask=m_c)
