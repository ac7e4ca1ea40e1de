"""Triton kernels of the up-convolutions.

P coarse pixels of the batch are the rows of the products, and N = C * S * S (channel, i, j) their columns, the channel
fastest where the map is channels_last. All tensors are read and written by their strides.
"""

import triton
import triton.language as tl


@triton.jit
def coarse_offsets(o_p, height, width, stride_b, stride_y, stride_x):
    # o_p is int64
    return o_p // (height * width) * stride_b + o_p // width % height * stride_y + o_p % width * stride_x


@triton.jit
def column_offsets(
    o_n, stride_c, stride_y, stride_x, C: tl.constexpr, S: tl.constexpr, CHANNELS_LAST: tl.constexpr
):  # fmt: skip
    if CHANNELS_LAST:
        o_c, o_s = o_n % C, o_n // C
    else:
        o_c, o_s = o_n // (S * S), o_n % (S * S)
    return o_c, o_c.to(tl.int64) * stride_c + (o_s // S).to(tl.int64) * stride_y + (o_s % S).to(tl.int64) * stride_x


@triton.jit
def _copy(
    skip, out, i_copy, copied, height, width, skip_b, skip_c, skip_y, skip_x, out_b, out_c, out_y, out_x,
    SKIP: tl.constexpr, BLOCK: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    o = i_copy.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < copied
    if CHANNELS_LAST:
        o_c, o_p = o % SKIP, o // SKIP
        o_x, o_y, o_b = o_p % width, o_p // width % height, o_p // (width * height)
    else:
        o_x, o_y = o % width, o // width % height
        o_c, o_b = o // (width * height) % SKIP, o // (width * height) // SKIP
    b = tl.load(skip + o_b * skip_b + o_c * skip_c + o_y * skip_y + o_x * skip_x, mask=m)
    tl.store(out + o_b * out_b + o_c * out_c + o_y * out_y + o_x * out_x, b, mask=m)


_SIZES = ["P", "height", "width", "blocks_n", "products", "copied"]


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    x, weight, bias, skip, up, out,
    P, height, width, blocks_n, products, copied,
    x_b, x_c, x_y, x_x, w_k, w_c, w_y, w_x, skip_b, skip_c, skip_y, skip_x, out_b, out_c, out_y, out_x,
    K: tl.constexpr, C: tl.constexpr, S: tl.constexpr, SKIP: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    if i < products:
        N: tl.constexpr = C * S * S
        o_p = (i // blocks_n).to(tl.int64) * BP + tl.arange(0, BP)
        o_n = i % blocks_n * BN + tl.arange(0, BN)
        m_p, m_n = o_p < P, o_n < N
        p_x = x + coarse_offsets(o_p, height, width, x_b, x_y, x_x)
        o_c, o_w = column_offsets(o_n, w_c, w_y, w_x, C, S, CHANNELS_LAST)
        b_up = tl.zeros([BP, BN], tl.float32)
        for i_k in range(0, K, BK):
            o_k = i_k + tl.arange(0, BK)
            m_k = o_k < K
            b_x = tl.load(p_x[:, None] + o_k[None, :].to(tl.int64) * x_c, mask=m_p[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(
                weight + o_k[:, None].to(tl.int64) * w_k + o_w[None, :], mask=m_k[:, None] & m_n[None, :], other=0.0
            )
            b_up = tl.dot(b_x, b_w, b_up, input_precision="ieee")  # [BP, BK] @ [BK, BN] -> [BP, BN]
        if HAS_BIAS:
            b_up += tl.load(bias + o_c, mask=m_n, other=0.0).to(tl.float32)[None, :]
        _, o_o = column_offsets(o_n, out_c, out_y, out_x, C, S, CHANNELS_LAST)
        p_o = up + coarse_offsets(o_p, height, width, out_b, S * out_y, S * out_x)
        tl.store(p_o[:, None] + o_o[None, :], b_up.to(up.dtype.element_ty), mask=m_p[:, None] & m_n[None, :])
    else:
        _copy(
            skip, out, i - products, copied, S * height, S * width,
            skip_b, skip_c, skip_y, skip_x, out_b, out_c, out_y, out_x, SKIP, BLOCK, CHANNELS_LAST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["P", "height", "width", "blocks_k"])
def grad_x_kernel(
    grad_up, weight, grad_x,
    P, height, width, blocks_k,
    x_b, x_c, x_y, x_x, w_k, w_c, w_y, w_x, g_b, g_c, g_y, g_x,
    K: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = C * S * S
    i = tl.program_id(0)
    o_p = (i // blocks_k).to(tl.int64) * BP + tl.arange(0, BP)
    o_k = i % blocks_k * BN + tl.arange(0, BN)
    m_p, m_k = o_p < P, o_k < K
    p_g = grad_up + coarse_offsets(o_p, height, width, g_b, S * g_y, S * g_x)
    b_d = tl.zeros([BP, BN], tl.float32)
    for i_n in range(0, N, BK):
        o_n = i_n + tl.arange(0, BK)
        m_n = o_n < N
        _, o_g = column_offsets(o_n, g_c, g_y, g_x, C, S, CHANNELS_LAST)
        _, o_w = column_offsets(o_n, w_c, w_y, w_x, C, S, CHANNELS_LAST)
        b_g = tl.load(p_g[:, None] + o_g[None, :], mask=m_p[:, None] & m_n[None, :], other=0.0)
        b_w = tl.load(
            weight + o_k[None, :].to(tl.int64) * w_k + o_w[:, None], mask=m_n[:, None] & m_k[None, :], other=0.0
        )
        b_d = tl.dot(b_g, b_w, b_d, input_precision="ieee")  # [BP, BK] @ [BK, BN] -> [BP, BN]
    p_d = grad_x + coarse_offsets(o_p, height, width, x_b, x_y, x_x)
    tl.store(
        p_d[:, None] + o_k[None, :].to(tl.int64) * x_c,
        b_d.to(grad_x.dtype.element_ty),
        mask=m_p[:, None] & m_k[None, :],
    )


@triton.jit(do_not_specialize=["P", "height", "width", "blocks_n", "rows_per_split"])
def grad_weight_kernel(
    grad_up, x, partial,
    P, height, width, blocks_n, rows_per_split,
    x_b, x_c, x_y, x_x, w_k, w_c, w_y, w_x, g_b, g_c, g_y, g_x,
    K: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    # partial [splits, K, C, S, S], each in the strides of the weight
    N: tl.constexpr = C * S * S
    i, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_k = i // blocks_n * BP + tl.arange(0, BP)
    o_n = i % blocks_n * BN + tl.arange(0, BN)
    m_k, m_n = o_k < K, o_n < N
    _, o_g = column_offsets(o_n, g_c, g_y, g_x, C, S, CHANNELS_LAST)
    b_d = tl.zeros([BP, BN], tl.float32)
    for i_p in range(0, rows_per_split, BK):
        o_p = i_s * rows_per_split + i_p + tl.arange(0, BK)
        m_p = o_p < P
        o_x = coarse_offsets(o_p, height, width, x_b, x_y, x_x)
        o_m = coarse_offsets(o_p, height, width, g_b, S * g_y, S * g_x)
        b_x = tl.load(x + o_x[None, :] + o_k[:, None].to(tl.int64) * x_c, mask=m_k[:, None] & m_p[None, :], other=0.0)
        b_g = tl.load(grad_up + o_m[:, None] + o_g[None, :], mask=m_p[:, None] & m_n[None, :], other=0.0)
        b_d = tl.dot(b_x, b_g, b_d, input_precision="ieee")  # [BP, BK] @ [BK, BN] -> [BP, BN]
    _, o_w = column_offsets(o_n, w_c, w_y, w_x, C, S, CHANNELS_LAST)
    p_d = partial + i_s * K * N + o_k[:, None].to(tl.int64) * w_k + o_w[None, :]
    tl.store(p_d, b_d, mask=m_k[:, None] & m_n[None, :])
