"""Triton kernel of upconv_concat_project: two products into one tile, of the coarse pixels at one offset (i, j)."""

import triton
import triton.language as tl

from tokenfusion.kernels.upconv.concat.triton_kernels import coarse_offsets


@triton.jit(do_not_specialize=["P", "height", "width", "blocks_c"])
def forward_kernel(
    x, weight, bias, skip, proj_skip, out,
    P, height, width, blocks_c,
    x_b, x_c, x_y, x_x, w_k, w_c, w_y, w_x, skip_b, skip_c, skip_y, skip_x, out_b, out_c, out_y, out_x,
    p_c, p_k,
    K: tl.constexpr, C: tl.constexpr, S: tl.constexpr, SKIP: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SKIP: tl.constexpr, PROJECTS: tl.constexpr,
):  # fmt: skip
    i, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_y, i_x = i_s // S, i_s % S
    o_p = (i // blocks_c).to(tl.int64) * BP + tl.arange(0, BP)
    o_c = i % blocks_c * BN + tl.arange(0, BN)
    m_p, m_c = o_p < P, o_c < C
    m_pc = m_p[:, None] & m_c[None, :]
    p_x = x + coarse_offsets(o_p, height, width, x_b, x_y, x_x)
    weight += i_y * w_y + i_x * w_x
    b_o = tl.zeros([BP, BN], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < K
        b_x = tl.load(p_x[:, None] + o_k[None, :].to(tl.int64) * x_c, mask=m_p[:, None] & m_k[None, :], other=0.0)
        o_w = o_k[:, None].to(tl.int64) * w_k + o_c[None, :].to(tl.int64) * w_c
        b_w = tl.load(weight + o_w, mask=m_k[:, None] & m_c[None, :], other=0.0)
        b_o = tl.dot(b_x, b_w, b_o, input_precision="ieee")  # [BP, BK] @ [BK, BN] -> [BP, BN]
    if HAS_SKIP:
        p_s = skip + coarse_offsets(o_p, height, width, skip_b, S * skip_y, S * skip_x) + i_y * skip_y + i_x * skip_x
        if PROJECTS:
            for i_k in range(0, SKIP, BK):
                o_k = i_k + tl.arange(0, BK)
                m_k = o_k < SKIP
                b_s = tl.load(
                    p_s[:, None] + o_k[None, :].to(tl.int64) * skip_c, mask=m_p[:, None] & m_k[None, :], other=0.0
                )
                b_p = tl.load(
                    proj_skip + o_k[:, None].to(tl.int64) * p_k + o_c[None, :].to(tl.int64) * p_c,
                    mask=m_k[:, None] & m_c[None, :],
                    other=0.0,
                )
                b_o = tl.dot(b_s, b_p, b_o, input_precision="ieee")  # [BP, BK] @ [BK, BN] -> [BP, BN]
        else:
            b_o += tl.load(p_s[:, None] + o_c[None, :].to(tl.int64) * skip_c, mask=m_pc, other=0.0).to(tl.float32)
    if HAS_BIAS:
        b_o += tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    p_o = out + coarse_offsets(o_p, height, width, out_b, S * out_y, S * out_x) + i_y * out_y + i_x * out_x
    tl.store(p_o[:, None] + o_c[None, :].to(tl.int64) * out_c, b_o.to(out.dtype.element_ty), mask=m_pc)
