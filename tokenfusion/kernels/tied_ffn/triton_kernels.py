"""Triton kernels of tied_ffn. M tokens, F features of the hidden layer, C channels; matrices are contiguous.

Programs lie along one axis, which alone may be longer than 65535. The columns of a result go by first: programs that
run together read the same rows, each of which comes from memory once, and the weight, which stays in the cache.
"""

import triton
import triton.language as tl


@triton.jit
def _activate(b_u, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return b_u * 0.5 * (1.0 + tl.math.erf(b_u * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        return b_u * tl.sigmoid(1.5957691216057308 * b_u * (1.0 + 0.044715 * b_u * b_u))
    if ACTIVATION == "relu":
        return tl.where(b_u < 0.0, 0.0, b_u)
    if ACTIVATION == "silu":
        return b_u * tl.sigmoid(b_u)
    return b_u


@triton.jit
def _slope(b_u, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        b_cdf = 0.5 * (1.0 + tl.math.erf(b_u * 0.7071067811865476))
        return b_cdf + b_u * tl.exp(-0.5 * b_u * b_u) * 0.3989422804014327
    if ACTIVATION == "gelu_tanh":
        b_s = tl.sigmoid(1.5957691216057308 * b_u * (1.0 + 0.044715 * b_u * b_u))
        return b_s + b_u * b_s * (1.0 - b_s) * 1.5957691216057308 * (1.0 + 0.134145 * b_u * b_u)
    if ACTIVATION == "relu":
        return tl.where(b_u <= 0.0, 0.0, 1.0)
    if ACTIVATION == "silu":
        b_s = tl.sigmoid(b_u)
        return b_s + b_u * b_s * (1.0 - b_s)
    return tl.full(b_u.shape, 1.0, tl.float32)


@triton.jit
def _block(i, SIZE: tl.constexpr, limit):
    o = i.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    return o, o < limit


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x, weight, bias, pre_activation, out, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, HOLD: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    # weight is [N, K] where TRANSPOSED, else [K, N]
    i = tl.program_id(0)
    blocks_n: tl.constexpr = (N + BN - 1) // BN
    o_m, m_m = _block(i // blocks_n, BM, M)
    o_n, m_n = _block(i % blocks_n, BN, N)
    stride_k = 1 if TRANSPOSED else N
    stride_n = K if TRANSPOSED else 1
    b_o = tl.zeros([BM, BN], tl.float32)
    for i_k in range(0, K, BK):
        o_k = (i_k + tl.arange(0, BK)).to(tl.int64)
        m_k = o_k < K
        b_x = tl.load(x + o_m[:, None] * K + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(
            weight + o_k[:, None] * stride_k + o_n[None, :] * stride_n, mask=m_k[:, None] & m_n[None, :], other=0.0
        )
        b_o = tl.dot(b_x, b_w, b_o, input_precision="ieee")
    if HAS_BIAS:
        b_o += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_o = o_m[:, None] * N + o_n[None, :]
    m_o = m_m[:, None] & m_n[None, :]
    if HOLD:
        tl.store(pre_activation + p_o, b_o.to(pre_activation.dtype.element_ty), mask=m_o)
    tl.store(out + p_o, _activate(b_o, ACTIVATION).to(out.dtype.element_ty), mask=m_o)


@triton.jit(do_not_specialize=["M"])
def narrow_forward_kernel(
    x, weight, bias_in, bias_out, y, M,
    F: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
    HAS_BIAS_IN: tl.constexpr, HAS_BIAS_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    o_m, m_m = _block(tl.program_id(0), BM, M)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    m_x = m_m[:, None] & m_c[None, :]
    b_x = tl.load(x + o_m[:, None] * C + o_c[None, :], mask=m_x, other=0.0)
    b_y = tl.zeros([BM, BC], tl.float32)
    for i_f in range(0, F, BF):
        o_f = (i_f + tl.arange(0, BF)).to(tl.int64)
        m_f = o_f < F
        b_w = tl.load(weight + o_f[:, None] * C + o_c[None, :], mask=m_f[:, None] & m_c[None, :], other=0.0)
        # [BM, BC] @ [BC, BF] -> [BM, BF]
        b_u = tl.dot(b_x, tl.trans(b_w), input_precision="ieee")
        if HAS_BIAS_IN:
            b_u += tl.load(bias_in + o_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
        b_h = _activate(b_u, ACTIVATION).to(b_w.dtype)
        b_y = tl.dot(b_h, b_w, b_y, input_precision="ieee")
    if HAS_BIAS_OUT:
        b_y += tl.load(bias_out + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    tl.store(y + o_m[:, None] * C + o_c[None, :], b_y.to(y.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["M"])
def hidden_backward_kernel(
    x, grad_y, weight, bias_in, hidden, activated, grad_hidden, M,
    F: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
    HAS_BIAS: tl.constexpr, HELD: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    # u and the gradient of the activated layer from one read of the weight
    i = tl.program_id(0)
    blocks_f: tl.constexpr = (F + BF - 1) // BF
    o_m, m_m = _block(i // blocks_f, BM, M)
    o_f, m_f = _block(i % blocks_f, BF, F)
    b_u = tl.zeros([BM, BF], tl.float32)
    b_g = tl.zeros([BM, BF], tl.float32)
    for i_c in range(0, C, BC):
        o_c = i_c + tl.arange(0, BC)
        m_c = o_c < C
        m_mc = m_m[:, None] & m_c[None, :]
        o_mc = o_m[:, None] * C + o_c[None, :]
        b_w = tl.load(weight + o_c[:, None] + o_f[None, :] * C, mask=m_c[:, None] & m_f[None, :], other=0.0)
        if not HELD:
            b_u = tl.dot(tl.load(x + o_mc, mask=m_mc, other=0.0), b_w, b_u, input_precision="ieee")
        b_g = tl.dot(tl.load(grad_y + o_mc, mask=m_mc, other=0.0), b_w, b_g, input_precision="ieee")
    o_mf = o_m[:, None] * F + o_f[None, :]
    m_mf = m_m[:, None] & m_f[None, :]
    if HELD:
        b_u = tl.load(hidden + o_mf, mask=m_mf, other=0.0).to(tl.float32)
    elif HAS_BIAS:
        b_u += tl.load(bias_in + o_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
    tl.store(activated + o_mf, _activate(b_u, ACTIVATION).to(activated.dtype.element_ty), mask=m_mf)
    tl.store(grad_hidden + o_mf, (b_g * _slope(b_u, ACTIVATION)).to(grad_hidden.dtype.element_ty), mask=m_mf)


@triton.jit
def _add_product(
    b_w, hidden, rows, first, count, o_f, m_f, o_c, m_c, M,
    F: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    # a loop of its own for each use of the weight: two products of one loop into one accumulator are wrong on tcgen05
    for i_m in range(0, count, BM):
        o_m = first + i_m + tl.arange(0, BM)
        m_m = o_m < M
        b_h = tl.load(hidden + o_f[:, None] + o_m[None, :] * F, mask=m_f[:, None] & m_m[None, :], other=0.0)
        b_r = tl.load(rows + o_m[:, None] * C + o_c[None, :], mask=m_m[:, None] & m_c[None, :], other=0.0)
        # [BF, BM] @ [BM, BC] -> [BF, BC]
        b_w = tl.dot(b_h, b_r, b_w, input_precision="ieee")
    return b_w


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def grad_weight_kernel(
    x, grad_y, activated, grad_hidden, partial, M, rows_per_split,
    F: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    blocks_f: tl.constexpr = (F + BF - 1) // BF
    blocks_c: tl.constexpr = (C + BC - 1) // BC
    o_f, m_f = _block(i % blocks_f, BF, F)
    o_c, m_c = _block(i // blocks_f % blocks_c, BC, C)
    i_s = (i // blocks_f // blocks_c).to(tl.int64)
    first = i_s * rows_per_split
    b_w = tl.zeros([BF, BC], tl.float32)
    b_w = _add_product(b_w, grad_hidden, x, first, rows_per_split, o_f, m_f, o_c, m_c, M, F, C, BM)
    b_w = _add_product(b_w, activated, grad_y, first, rows_per_split, o_f, m_f, o_c, m_c, M, F, C, BM)
    p_w = partial + i_s * F * C + o_f[:, None] * C + o_c[None, :]
    tl.store(p_w, b_w, mask=m_f[:, None] & m_c[None, :])
