"""Triton kernels of dynamic_mixing. A row is a segment of a line; BR rows share each read of the generator's weight.

Logits are indexed [row, target, source]; the columns of the products with the generator's weight are targets x sources.
"""

import triton
import triton.language as tl


@triton.jit
def _locate(i_r, R, lines, stride_b, stride_l, S: tl.constexpr, OFFSET: tl.constexpr, BR: tl.constexpr):
    # [BR] offsets of the rows' first token in a tensor whose segments are OFFSET elements wide
    o_r = i_r * BR + tl.arange(0, BR).to(tl.int64)
    o_line = o_r // S
    return (o_line // lines) * stride_b + (o_line % lines) * stride_l + (o_r % S) * OFFSET, o_r < R


@triton.jit
def _columns(i_t, N: tl.constexpr, BT: tl.constexpr, NP: tl.constexpr):
    # [BT * NP] rows of the generator's weight
    o_j = i_t * BT + tl.arange(0, BT * NP) // NP
    o_i = tl.arange(0, BT * NP) % NP
    return o_i * N + o_j, (o_i < N) & (o_j < N)


@triton.jit
def _load_compressed(p_z, m_r, o_k, stride_t, N: tl.constexpr, REDUCED: tl.constexpr):
    # [BR, BK]
    o_z = (o_k // REDUCED).to(tl.int64) * stride_t + o_k % REDUCED
    return tl.load(p_z[:, None] + o_z[None, :], mask=m_r[:, None] & (o_k < N * REDUCED)[None, :], other=0.0)


@triton.jit
def _mixing_weights(
    p_z, m_r, stride_t, weight, bias, i_t,
    N: tl.constexpr, REDUCED: tl.constexpr, BT: tl.constexpr, NP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = N * REDUCED
    BR: tl.constexpr = p_z.shape[0]
    o_w, m_w = _columns(i_t, N, BT, NP)
    b_s = tl.zeros([BR, BT * NP], tl.float32)
    for i_k in tl.range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_z = _load_compressed(p_z, m_r, o_k, stride_t, N, REDUCED)
        b_w = tl.load(weight + o_w[None, :] * K + o_k[:, None], mask=m_w[None, :] & (o_k < K)[:, None], other=0.0)
        # [BR, BK] @ [BK, BT * NP] -> [BR, BT * NP]
        b_s = tl.dot(b_z, b_w, b_s, input_precision="ieee")
    b_s += tl.load(bias + o_w, mask=m_w, other=0.0).to(tl.float32)[None, :]
    b_s = tl.reshape(b_s, [BR, BT, NP])
    b_s = tl.where((tl.arange(0, NP) < N)[None, None, :], b_s, float("-inf"))
    b_p = tl.exp(b_s - tl.max(b_s, 2)[:, :, None])
    return b_p / tl.sum(b_p, 2)[:, :, None]


@triton.jit
def _load_tokens(p_x, m_r, o_n, o_c, stride_t, N: tl.constexpr, WIDTH: tl.constexpr):
    # [BR, tokens, channels], for o_n [1, tokens, 1] and o_c [1, 1, channels], or the last two exchanged
    p = p_x[:, None, None] + o_n.to(tl.int64) * stride_t + o_c
    return tl.load(p, mask=m_r[:, None, None] & (o_n < N) & (o_c < WIDTH), other=0.0)


@triton.jit
def _load_gradient(
    p_g, p_m, m_r, o_n, o_c, stride_t, N: tl.constexpr, WIDTH: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    b_g = _load_tokens(p_g, m_r, o_n, o_c, stride_t, N, WIDTH)
    if HAS_MEAN:
        b_m = tl.load(p_m[:, None, None] + o_c, mask=m_r[:, None, None] & (o_c < WIDTH), other=0.0)
        b_g = tl.where(o_n < N, b_g.to(tl.float32) + b_m, 0.0).to(b_g.dtype)
    return b_g


@triton.jit
def _logit_gradients(
    b_p, p_x, p_g, p_m, m_r, i_t, stride_xt, stride_gt,
    N: tl.constexpr, WIDTH: tl.constexpr, BC: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    BT: tl.constexpr = b_p.shape[1]
    NP: tl.constexpr = b_p.shape[2]
    o_j = i_t * BT + tl.arange(0, BT)
    o_i = tl.arange(0, NP)
    b_dp = tl.zeros_like(b_p)
    for i_c in tl.range(0, WIDTH, BC):
        o_c = i_c + tl.arange(0, BC)
        b_g = _load_gradient(p_g, p_m, m_r, o_j[None, :, None], o_c[None, None, :], stride_gt, N, WIDTH, HAS_MEAN)
        b_x = _load_tokens(p_x, m_r, o_i[None, None, :], o_c[None, :, None], stride_xt, N, WIDTH)
        # BR x [BT, BC] @ [BC, NP] -> [BT, NP]
        b_dp = tl.dot(b_g, b_x, b_dp, input_precision="ieee")
    b_delta = tl.sum(b_p * b_dp, 2)
    return b_p * (b_dp - b_delta[:, :, None])


@triton.jit(do_not_specialize=["R", "lines"])
def forward_kernel(
    x, compressed, weight, bias, mixed, sums, R, lines,
    stride_xb, stride_xl, stride_xt, stride_zb, stride_zl, stride_zt, stride_ob, stride_ol, stride_ot,
    N: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr, REDUCED: tl.constexpr, WITH_SUMS: tl.constexpr,
    BR: tl.constexpr, BT: tl.constexpr, NP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_r, i_t = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_x, m_r = _locate(i_r, R, lines, stride_xb, stride_xl, S, WIDTH, BR)
    o_z, _ = _locate(i_r, R, lines, stride_zb, stride_zl, S, REDUCED, BR)
    o_o, _ = _locate(i_r, R, lines, stride_ob, stride_ol, S, WIDTH, BR)
    b_p = _mixing_weights(compressed + o_z, m_r, stride_zt, weight, bias, i_t, N, REDUCED, BT, NP, BK)
    b_p = b_p.to(x.dtype.element_ty)
    o_i = tl.arange(0, NP)
    o_j = i_t * BT + tl.arange(0, BT)
    for i_c in tl.range(0, WIDTH, BC):
        o_c = i_c + tl.arange(0, BC)
        b_x = _load_tokens(x + o_x, m_r, o_i[None, :, None], o_c[None, None, :], stride_xt, N, WIDTH)
        # BR x [BT, NP] @ [NP, BC] -> [BT, BC]
        b_o = tl.dot(b_p, b_x, input_precision="ieee")
        m_o = m_r[:, None, None] & (o_j < N)[None, :, None] & (o_c < WIDTH)[None, None, :]
        p_o = mixed + o_o[:, None, None] + o_j.to(tl.int64)[None, :, None] * stride_ot + o_c[None, None, :]
        tl.store(p_o, b_o.to(mixed.dtype.element_ty), mask=m_o)
        if WITH_SUMS:
            b_sum = tl.sum(tl.where((o_j < N)[None, :, None], b_o, 0.0), 1)
            o_r = i_r * BR + tl.arange(0, BR)
            p_s = sums + (i_t.to(tl.int64) * R + o_r)[:, None] * WIDTH + o_c[None, :]
            tl.store(p_s, b_sum, mask=m_r[:, None] & (o_c < WIDTH)[None, :])


@triton.jit(do_not_specialize=["R", "lines"])
def grad_x_kernel(
    compressed, weight, bias, grad_mixed, grad_mean, grad_x, R, lines,
    stride_zb, stride_zl, stride_zt, stride_gb, stride_gl, stride_gt, stride_ob, stride_ol, stride_ot,
    N: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr, REDUCED: tl.constexpr, HAS_MEAN: tl.constexpr,
    BR: tl.constexpr, BT: tl.constexpr, NP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_r, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_z, m_r = _locate(i_r, R, lines, stride_zb, stride_zl, S, REDUCED, BR)
    o_g, _ = _locate(i_r, R, lines, stride_gb, stride_gl, S, WIDTH, BR)
    o_o, _ = _locate(i_r, R, lines, stride_ob, stride_ol, S, WIDTH, BR)
    o_m, _ = _locate(i_r, R, lines, S * WIDTH, 0, S, WIDTH, BR)
    o_c = i_c * BC + tl.arange(0, BC)
    b_dx = tl.zeros([BR, BC, NP], tl.float32)
    for i_t in tl.range(0, tl.cdiv(N, BT)):
        b_p = _mixing_weights(compressed + o_z, m_r, stride_zt, weight, bias, i_t, N, REDUCED, BT, NP, BK)
        o_j = i_t * BT + tl.arange(0, BT)
        b_g = _load_gradient(
            grad_mixed + o_g, grad_mean + o_m, m_r, o_j[None, None, :], o_c[None, :, None], stride_gt, N, WIDTH,
            HAS_MEAN,
        )  # fmt: skip
        # BR x [BC, BT] @ [BT, NP] -> [BC, NP]
        b_dx = tl.dot(b_g, b_p.to(b_g.dtype), b_dx, input_precision="ieee")
    o_i = tl.arange(0, NP)
    p_o = grad_x + o_o[:, None, None] + o_i.to(tl.int64)[None, None, :] * stride_ot + o_c[None, :, None]
    m_o = m_r[:, None, None] & (o_i < N)[None, None, :] & (o_c < WIDTH)[None, :, None]
    tl.store(p_o, b_dx.to(grad_x.dtype.element_ty), mask=m_o)


@triton.jit(do_not_specialize=["R", "lines"])
def grad_compressed_kernel(
    x, compressed, weight, bias, grad_mixed, grad_mean, grad_compressed, R, lines,
    stride_xb, stride_xl, stride_xt, stride_zb, stride_zl, stride_zt, stride_gb, stride_gl, stride_gt,
    stride_ob, stride_ol, stride_ot,
    N: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr, REDUCED: tl.constexpr, HAS_MEAN: tl.constexpr,
    BR: tl.constexpr, BT: tl.constexpr, NP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = N * REDUCED
    i_r, i_o = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_x, m_r = _locate(i_r, R, lines, stride_xb, stride_xl, S, WIDTH, BR)
    o_z, _ = _locate(i_r, R, lines, stride_zb, stride_zl, S, REDUCED, BR)
    o_g, _ = _locate(i_r, R, lines, stride_gb, stride_gl, S, WIDTH, BR)
    o_o, _ = _locate(i_r, R, lines, stride_ob, stride_ol, S, REDUCED, BR)
    o_m, _ = _locate(i_r, R, lines, S * WIDTH, 0, S, WIDTH, BR)
    o_k = i_o * BO + tl.arange(0, BO)
    b_dz = tl.zeros([BR, BO], tl.float32)
    for i_t in tl.range(0, tl.cdiv(N, BT)):
        b_p = _mixing_weights(compressed + o_z, m_r, stride_zt, weight, bias, i_t, N, REDUCED, BT, NP, BK)
        b_ds = _logit_gradients(
            b_p, x + o_x, grad_mixed + o_g, grad_mean + o_m, m_r, i_t, stride_xt, stride_gt, N, WIDTH, BC, HAS_MEAN
        )
        b_ds = tl.reshape(b_ds, [BR, BT * NP]).to(x.dtype.element_ty)
        o_w, m_w = _columns(i_t, N, BT, NP)
        b_w = tl.load(weight + o_w[:, None] * K + o_k[None, :], mask=m_w[:, None] & (o_k < K)[None, :], other=0.0)
        # [BR, BT * NP] @ [BT * NP, BO] -> [BR, BO]
        b_dz = tl.dot(b_ds, b_w, b_dz, input_precision="ieee")
    p_o = grad_compressed + o_o[:, None] + ((o_k // REDUCED).to(tl.int64) * stride_ot + o_k % REDUCED)[None, :]
    tl.store(p_o, b_dz.to(grad_compressed.dtype.element_ty), mask=m_r[:, None] & (o_k < K)[None, :])


@triton.jit(do_not_specialize=["R", "lines", "blocks_per_split"])
def grad_weight_kernel(
    x, compressed, weight, bias, grad_mixed, grad_mean, grad_weight, grad_bias, R, lines, blocks_per_split,
    stride_xb, stride_xl, stride_xt, stride_zb, stride_zl, stride_zt, stride_gb, stride_gl, stride_gt,
    N: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr, REDUCED: tl.constexpr, HAS_MEAN: tl.constexpr,
    BR: tl.constexpr, BT: tl.constexpr, NP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = N * REDUCED
    i_t, i_o, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_k = i_o * BO + tl.arange(0, BO)
    o_zk = (o_k // REDUCED).to(tl.int64) * stride_zt + o_k % REDUCED
    b_dw = tl.zeros([BO, BT * NP], tl.float32)
    for i_b in tl.range(0, blocks_per_split):
        i_r = i_s * blocks_per_split + i_b
        o_x, m_r = _locate(i_r, R, lines, stride_xb, stride_xl, S, WIDTH, BR)
        o_z, _ = _locate(i_r, R, lines, stride_zb, stride_zl, S, REDUCED, BR)
        o_g, _ = _locate(i_r, R, lines, stride_gb, stride_gl, S, WIDTH, BR)
        o_m, _ = _locate(i_r, R, lines, S * WIDTH, 0, S, WIDTH, BR)
        b_p = _mixing_weights(compressed + o_z, m_r, stride_zt, weight, bias, i_t, N, REDUCED, BT, NP, BK)
        b_ds = _logit_gradients(
            b_p, x + o_x, grad_mixed + o_g, grad_mean + o_m, m_r, i_t, stride_xt, stride_gt, N, WIDTH, BC, HAS_MEAN
        )
        b_ds = tl.reshape(b_ds, [BR, BT * NP])
        p_z = compressed + o_z[None, :] + o_zk[:, None]
        b_z = tl.load(p_z, mask=m_r[None, :] & (o_k < K)[:, None], other=0.0)
        b_z = tl.where((o_k == K)[:, None], 1.0, b_z).to(b_z.dtype)  # the input of the bias
        # [BO, BR] @ [BR, BT * NP] -> [BO, BT * NP]
        b_dw = tl.dot(b_z, b_ds.to(b_z.dtype), b_dw, input_precision="ieee")
    o_w, m_w = _columns(i_t, N, BT, NP)
    p_w = grad_weight + i_s * N * N * K + o_w[None, :] * K + o_k[:, None]
    tl.store(p_w, b_dw, mask=m_w[None, :] & (o_k < K)[:, None])
    p_b = grad_bias + i_s * N * N + o_w[None, :] + tl.zeros_like(o_k)[:, None]
    tl.store(p_b, b_dw, mask=m_w[None, :] & (o_k == K)[:, None])
